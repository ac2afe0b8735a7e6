"""The tree's language: American spelling, no riddles, one meaning per class name, comments where they help.

Words and phrases are written with marks, `_` for a space and `|` for nothing, so that this file has no hit itself.
"""

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from shoestring.tests.tree import ROOT, tree_files

PACKAGE = ("comm", "parallelism", "trainer", "launch")
ENDINGS = (".py", ".md", ".sh", ".yaml", ".sbatch", ".html")

MAX_PER_UNIT, MAX_HARD_WORDS, MAX_FRAGMENTS = 10, 30, 60
MAX_PUBLIC_FRAGMENTS, MAX_HARD_DOCSTRINGS = 39, 19
MAX_SMALL_FILES, SMALL_FILE_LINES = 14, 40
MIN_COMMENTS_PER_100_LINES = 4.0
COMMENTED = ("comm", "parallelism", "trainer/model", "trainer/run", "launch/planner")


def spelled(*marked: str) -> tuple[str, ...]:
    """Return words without their marks."""
    return tuple(word.replace("|", "").replace("_", " ") for word in marked)


def any_of(*words: str) -> str:
    """Return a pattern for any of these patterns."""
    return f"(?:{'|'.join(words)})"


BRITISH_WORDS = spelled(
    *("behavi|our", "col|our", "neighb|our", "fav|our", "hon|our", "lab|our", "cent|re", "met|re", "lic|ence"),
    *("art|efact", "cata|logue", "gr|ey", "wh|ilst", "lear|nt", "label|led", "model|led", "travel|led"),
    *("analys|ed", "analys|ing"),
)
BRITISH_VERBS = (
    *("normal", "initial", "serial", "quant", "optim", "organ", "recogn", "synchron", "summar", "general", "special"),
    *("parallel", "min", "maxim", "util", "final", "visual", "local"),
)
"""Stems of verbs that end in -ize."""
BRITISH_VERB_ENDINGS = spelled("is|e", "is|ed", "is|es", "is|ing", "is|ation")
BRITISH = re.compile(
    rf"\b{any_of(*BRITISH_WORDS, any_of(*BRITISH_VERBS) + any_of(*BRITISH_VERB_ENDINGS))}\b", re.IGNORECASE
)

COUNTED = (
    *("tokens?", "steps?", "bytes", "[GM]B", "FLOPs?", "hours?", "ms", "seconds", "rows", "GPUs", "launches"),
    *("dollars", "active", "micro-batch(?:es)?"),
)
UNITS = ("token", "step", "second", "rank", "layer", "day", "hour", "micro-batch", "GPU", "node", "expert", "trillion")
AN_INSTEAD_OF_PER = re.compile(rf"\b{any_of(*COUNTED)} an? {any_of(*UNITS)}\b")

HARD_WORDS = spelled(
    *("who|ever", "no|body", "some|body", "for_ever", "goes_on", "went_on", "made_again", "told_of", "put_off"),
    *("so_many", "so_much", "its_like", "comes_into_being", "on_paper", "a_life", "lives_on", "what_is_here"),
    *("of_ours", "turned_out_of", "in_the_end_alone", "has_alone"),
)
HARD_PATTERNS = ("hand(?:s|ed)? out", "takes? turns")
HARD = re.compile(rf"\b{any_of(*HARD_WORDS, *HARD_PATTERNS)}\b")
HARD_IN_DOCSTRINGS = spelled(
    *("be|side", "who|ever", "whatever_is_here", "goes_on", "made_again", "so_many", "so_much", "told_of", "tur|ned"),
    *("on_paper", "put_off", "no|body", "some|body", "for_ever", "a_life", "li|ves"),
)
HARD_DOCSTRING = re.compile(rf"\b{any_of(*HARD_IN_DOCSTRINGS, HARD_PATTERNS[0])}\b")

NO_VERB_AND_NO_NOUN = (
    *("Of", "By", "In", "At", "On", "For", "From", "With", "Beside", "Behind", "Before", "After", "Until", "Where"),
    *("Whether", "To", "The same", "What", "How", "As"),
)
FRAGMENT = re.compile(rf"{any_of(*NO_VERB_AND_NO_NOUN)}\b")
FRAGMENT_LINE = re.compile(rf'\s*"""{FRAGMENT.pattern}')

# Messages, headings and sentences that were replaced: literal parts of at least two words; `{}` is a number or a name.
RETIRED_PHRASES = spelled(
    *("of the run's budget;", "a_trillion tokens (published"),
    *("the fullest rank has", "resident in the process,", "at most so far", "stop at step {} reason", "reason done"),
    *("shoestring {}: refused", "is missing: run `shoestring data prepare` first"),
    *("Everything is written;", "comes_into being.", "is no work of this corpus"),
    *("holds out every work; leave some to train on", "belongs to a preparation that is under way, or was killed;"),
    *("remove it in the second case", "Tokenizer {} lear|nt", "works, vocabulary"),
    *("held after the run was done", "charged to nothing", "from the last sign of a_life that died to its end"),
    *("from a death to the next life's first step", "steps that changed no weight: not finite"),
    *("edge wait", "reduce wait", "exposed exchange"),
    *("steps in the weights", "of what was allocated is in the weights"),
    *("holds no FB in which layers with experts take_turns", "exchanges wait nowhere"),
    *("neither imbalance nor messages", "both: the forecast"),
    *("without the report's savings", "moments {} B", "SMs lent"),
    *("gives {} micro-batches of {} sequences", "needs an even number (one half for each direction) and at least"),
    *("(twice the ranks, which fill from both ends)", "no order of things is under", "limited by {} of the step"),
    *("limited by waits", "waits between stages", "As it ran", "As it runs on_paper"),
    *("Maximum violation, worst layer:", "the fullest over the mean, minus 1"),
    *("Load of each expert (a row)", "at each step that was told_of", "to its last word", "this of that"),
    *("What serves what, here", "all-to-all, a row an expert: the oracle", "train on such GPUs", "bytes, up to"),
    *("schedules that are data", "forward and backward taking turns at each exchange", "cross once a_token and node"),
    *("A checkpoint that the run has told_of survives any crash", "the twin", "the oracle"),
)
RETIRED_LABELS = ("made from", "contents")
"""Labels before a value; as parts of a sentence they are plain."""
RETIRED_WORDS = ("its spans", "works", "made from")
"""Whole table heads and values of errors."""
RETIRED_IN_DOCS = spelled("li|ves", "verdict")


@cache
def all_lines() -> tuple[tuple[Path, int, str], ...]:
    """Return every line of the tree's code and pages: file, number and text."""
    files = [path for path in tree_files() if path.name.endswith(ENDINGS)]
    texts = ((path, (ROOT / path).read_text(errors="replace")) for path in files)
    return tuple((path, number, line) for path, text in texts for number, line in enumerate(text.splitlines(), 1))


def package_files() -> list[Path]:
    """Return the Python files of the package."""
    return [path for path in tree_files(".py") if path.parts[0] in PACKAGE]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def public_docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield place, name and docstring of the functions and classes of the package."""
    for path in package_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield f"{path}:{node.lineno}", node.name, text


def found_in(pattern: re.Pattern[str]) -> list[str]:
    return [f"{path}:{number}: {line.strip()[:110]}" for path, number, line in all_lines() if pattern.search(line)]


def assert_at_most(limit: int, found: list[str], what: str) -> None:
    """Fail if there are more than `limit`, and list them."""
    assert len(found) <= limit, f"{len(found)} {what}, at most {limit} are allowed:\n" + "\n".join(found)


def test_the_rules_themselves(tmp_path: Path) -> None:
    assert BRITISH.search("".join(("it normal", "ises")))
    assert not BRITISH.search("it normalizes a tensor and labels it")
    assert AN_INSTEAD_OF_PER.search(" ".join(("7392 bytes", "a token")))
    assert not AN_INSTEAD_OF_PER.search("7392 bytes per token")
    assert HARD.search(" ".join(("for", "ever")))
    assert FRAGMENT_LINE.match('    """Of both ranks."""')
    assert not FRAGMENT_LINE.match('    """Offset of a rank."""')
    assert phrase_pattern("moments {} B").search("with moments 4 B")
    assert phrase_pattern("moments {} B").search("with moments {} B")
    assert not phrase_pattern("the twin").search("the twins")
    source = '"""A module."""\n\n# The reason.\nx = f"up to {size} " "bytes"  # noqa: X\n'
    assert sorted(strings_and_comments_of(source)) == ["A module.", "The reason.\nnoqa: X", "up to {} bytes"]
    (tmp_path / "x.py").write_text(source)
    assert count_comments(tmp_path / "x.py") == (1, 1)


def test_spelling_is_american() -> None:
    assert_at_most(0, found_in(BRITISH), "lines with British spelling; write the American one")


def test_per_is_not_written_as_an_article() -> None:
    found = found_in(AN_INSTEAD_OF_PER)
    assert_at_most(MAX_PER_UNIT, found, "lines say `a` or `an` for `per`; write `bytes per token`, `tokens/s`")


def test_words_need_no_second_reading() -> None:
    assert_at_most(MAX_HARD_WORDS, found_in(HARD), "lines with words that need a second reading")


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{path}:{number}: {line.strip()[:110]}" for path, number, line in all_lines() if FRAGMENT_LINE.match(line)
    ]
    assert_at_most(MAX_FRAGMENTS, found, "docstrings begin with neither a verb nor a noun")


def test_public_docstrings_of_the_package_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{place} {name}: {text[:70]!r}"
        for place, name, text in public_docstrings()
        if FRAGMENT.match(text) and not name.startswith("_")
    ]
    assert_at_most(MAX_PUBLIC_FRAGMENTS, found, "public docstrings begin with neither a verb nor a noun")


def test_docstrings_of_the_package_need_no_second_reading() -> None:
    found = [
        f"{place} {name}: {word[0]!r}"
        for place, name, text in public_docstrings()
        if (word := HARD_DOCSTRING.search(text))
    ]
    assert_at_most(MAX_HARD_DOCSTRINGS, found, "docstrings with words that need a second reading")


def count_comments(path: Path) -> tuple[int, int]:
    """Return a file's comments, without marks for tools, and its lines of code, without docstrings and blank lines."""
    comments, code = 0, set[int]()
    with path.open("rb") as source:
        tokens = list(tokenize.tokenize(source.readline))
    starts = (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL, tokenize.ENCODING, tokenize.DEDENT)
    for before, token in pairwise(tokens):
        if token.type == tokenize.COMMENT:
            comments += not re.match(r"#\s*(?:noqa|type:|ruff|mypy|fmt|pragma)", token.string)
        elif token.type == tokenize.STRING and before.type in starts:
            continue
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code.update(range(token.start[0], token.end[0] + 1))
    return comments, len(code)


@pytest.mark.parametrize("folder", COMMENTED)
def test_comments_say_why(folder: str) -> None:
    files = [path for path in package_files() if path.as_posix().startswith(f"{folder}/")]
    counts = [count_comments(ROOT / path) for path in files]
    comments, code = (sum(column) for column in zip(*counts, strict=True))
    density = 100 * comments / code
    assert density >= MIN_COMMENTS_PER_100_LINES, (
        f"{folder}/: {density:.2f} comments per 100 lines of code ({comments} of {code}), "
        f"at least {MIN_COMMENTS_PER_100_LINES:g} are wanted: say why, with the number, where a reader needs it"
    )


def test_few_files_are_small() -> None:
    sizes = {path: len((ROOT / path).read_text().splitlines()) for path in package_files() if path.stem != "__init__"}
    found = [f"{path}: {lines} lines" for path, lines in sizes.items() if 0 < lines < SMALL_FILE_LINES]
    assert_at_most(MAX_SMALL_FILES, found, f"files under {SMALL_FILE_LINES} lines; merge halves of one idea")


def test_a_class_name_means_one_thing() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path in package_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(f"{path}:{node.lineno}")
    found = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert_at_most(0, found, "class names are defined twice; rename one")


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """Return a pattern for a phrase, in which `{}` is up to 40 characters, and a space may be any white space."""
    literal = re.escape(phrase).replace(r"\{\}", ".{1,40}?").replace(r"\ ", r"\s+")
    # A phrase that begins or ends with a letter is not a part of a longer word.
    start, end = (r"\b" if edge.isalnum() else "" for edge in (phrase[0], phrase[-1]))
    return re.compile(f"{start}{literal}{end}")


RETIRED = tuple(phrase_pattern(phrase) for phrase in RETIRED_PHRASES)


def strings_of(source: str) -> Iterator[str]:
    """Yield the strings of a Python file, each joined as a reader sees it; `{}` stands for a value."""
    tree = ast.parse(source)
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            yield node.value


def strings_and_comments_of(source: str) -> list[str]:
    """Return the texts of a Python file; its comments are one text, for a phrase may go over two lines."""
    comments = (line.partition("#")[2].strip() for line in source.splitlines() if "#" in line)
    return [*strings_of(source), "\n".join(comments)]


def retired_files() -> list[Path]:
    """Return code, README and docs: neither tests, nor the corpus, nor recorded results, nor the history of changes."""
    endings = (*ENDINGS, ".svg", ".csv", ".cpp", ".json")
    left_out = ("tests/", "trainer/data/corpus/", "benchmarks/results/", "CHANGELOG.md")
    return [path for path in tree_files() if path.name.endswith(endings) and not path.as_posix().startswith(left_out)]


def test_retired_phrases_are_gone() -> None:
    found = []
    for path in retired_files():
        text = (ROOT / path).read_text(errors="replace")
        texts = strings_and_comments_of(text) if path.suffix == ".py" else [text]
        hits = {hit[0] for each in texts for pattern in RETIRED for hit in pattern.finditer(each)}
        found += [f"{path}: {' '.join(hit.split())!r}" for hit in sorted(hits)]
    assert_at_most(0, found, "phrases that were replaced by plainer ones")


def test_retired_labels_are_gone() -> None:
    label = re.compile(rf"{any_of(*RETIRED_LABELS)}  |{any_of(*RETIRED_WORDS)}$")
    texts = ((path, text) for path in package_files() for text in strings_of((ROOT / path).read_text()))
    found = [f"{path}: {text[:70]!r}" for path, text in texts if label.match(text)]
    assert_at_most(0, found, "labels that were replaced by plainer ones")


def test_retired_words_are_not_in_the_docs() -> None:
    pattern = re.compile(rf"\b{any_of(*RETIRED_IN_DOCS)}\b", re.IGNORECASE)
    found = [
        f"{path}:{number}: {line.strip()[:110]}"
        for path, number, line in all_lines()
        if (path.name == "README.md" or path.parts[0] == "docs") and pattern.search(line)
    ]
    assert_at_most(0, found, "lines of README and docs with words that were replaced")
