"""Files on disk and in a bucket: the same names, the same bytes, and one clear error."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.bucket import s3_server
from shoestring.tests.trainer.data.small_corpus import silent
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.storage import hash_stored_file, list_files, open_binary

NAMES = ("a.txt", "b.jsonl", "sub/c.txt", "sub/deep/d.jsonl")


def write_files(folder: Path) -> Path:
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}\n")
    return folder


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("s3") / "buckets"
    write_files(folder / "corpus")
    (folder / "texts").mkdir()
    with s3_server(folder) as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield folder


def names(place: str) -> list[str]:
    return [file.name for file in list_files(place)]


def refusal(place: str) -> str:
    with pytest.raises(ConfigError) as caught:
        list_files(place)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", ["path", "file://", "s3://"])
def test_a_file_a_folder_and_a_glob(tmp_path: Path, buckets: Path, kind: str) -> None:
    local = write_files(tmp_path / "corpus")
    root = {"path": str(local), "file://": f"file://{local}", "s3://": "s3://corpus"}[kind]
    assert names(root) == sorted(NAMES)
    assert names(f"{root}/sub") == ["c.txt", "deep/d.jsonl"]
    assert names(f"{root}/sub/c.txt") == ["c.txt"]
    assert names(f"{root}/**/*.jsonl") == ["b.jsonl", "sub/deep/d.jsonl"]
    assert names(f"{root}/*.txt") == ["a.txt"]
    assert names(f"{root}/[ab].*") == ["a.txt", "b.jsonl"]
    assert names(f"{root}/?.txt") == ["a.txt"]
    files = list_files(root)
    assert [file.bytes for file in files] == [len(f"content of {name}\n") for name in sorted(NAMES)]
    with open_binary(files[0].url) as stream:
        assert stream.read() == b"content of a.txt\n"
    with open_binary(files[0].url) as stream:
        stream.seek(8)
        assert stream.read(2) == b"of"


def test_the_signature_changes_with_the_content(tmp_path: Path, buckets: Path) -> None:
    local = write_files(tmp_path / "corpus")
    for place, path in ((str(local), local / "a.txt"), ("s3://corpus", buckets / "corpus" / "a.txt")):
        before = list_files(place)
        path.write_text("Content of a.txt\n")
        os.utime(path, ns=(10**18, 10**18))
        after = list_files(place)
        assert [a.signature == b.signature for a, b in zip(before, after, strict=True)] == [False, True, True, True]
        assert before[0].bytes == after[0].bytes
    write_files(buckets / "corpus")


def test_parts_of_a_file_are_hashed(tmp_path: Path, buckets: Path) -> None:
    import hashlib

    file = list_files("s3://corpus")[0]
    assert hash_stored_file(file, 3, 5) == hashlib.sha256(b"content of a.txt\n"[3:8]).hexdigest()
    with pytest.raises(ConfigError, match="has become shorter"):
        hash_stored_file(file, 0, 1000)


def test_a_corpus_in_a_bucket_gives_the_same_data(config: DataConfig, buckets: Path, tmp_path: Path) -> None:
    shutil.copytree(config.corpus, buckets / "texts", dirs_exist_ok=True)
    remote = replace(config, corpus="s3://texts", prepared=config.prepared + "_remote")
    local, found = prepare_corpus(config, silent), prepare_corpus(remote, silent)
    assert found.content_hash == local.content_hash
    lines: list[str] = []
    prepare_corpus(remote, lines.append)
    assert "3 of 3 tasks were finished before and are kept." in lines


def test_places_that_do_not_exist_are_named(tmp_path: Path, buckets: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "nowhere"))
    assert "matches no file" in refusal(str(tmp_path / "*.txt"))
    for place in ("s3://nowhere", "s3://nowhere/a.txt", "s3://corpus/none", "s3://corpus/*.csv"):
        message = refusal(place)
        assert f"data.corpus = '{place}'" in message


def test_a_bucket_that_refuses_the_keys_is_named(buckets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecretkey")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert "data.corpus = 's3://corpus': is refused by the store" in refusal("s3://corpus")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_other_protocols_and_missing_packages_are_named(tmp_path: Path) -> None:
    assert "Protocol not known" in refusal("nosuch://place/a.txt")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        assert "needs a package that is not installed" in (message := refusal("gs://bucket/a.txt"))
        assert "pip install gcsfs" in message


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "corpus")

    def scandir(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert "cannot be listed: Permission denied" in refusal(str(tmp_path / "corpus"))


def test_broken_links_and_names_that_are_not_utf8_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to("/not/mounted")
    (tmp_path / os.fsdecode(b"\xff.txt")).touch()
    with pytest.raises(ConfigError) as caught:
        list_files(str(tmp_path))
    assert [problem.hint.split(";")[0] for problem in caught.value.problems] == [
        "is a broken link",
        "has a name that is not UTF-8",
    ]
