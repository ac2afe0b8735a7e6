"""Tasks depend on the files alone, and a new file leaves those of the others as they are."""

from random import Random

from shoestring.trainer.data.preparation.tasks import MAX_UNGROUPED_FILES, CorpusFile, Task, plan_tasks
from shoestring.trainer.data.storage import StoredFile


def stored(name: str, size: int) -> StoredFile:
    return StoredFile(f"/corpus/{name}", name, size, f"{size} 0")


def plan(files: list[StoredFile], task_bytes: int = 100) -> tuple[Task, ...]:
    return plan_tasks([CorpusFile(file, is_validation=file.name.startswith("v")) for file in files], task_bytes)


def test_each_file_is_a_task_and_large_json_lines_are_cut() -> None:
    tasks = plan([stored("b.jsonl", 250), stored("a.jsonl.gz", 250), stored("v.txt", 250)])
    assert [(task.files[0].name, task.part, task.is_validation) for task in tasks] == [
        ("a.jsonl.gz", None, False),
        ("b.jsonl", (0, 100), False),
        ("b.jsonl", (100, 200), False),
        ("b.jsonl", (200, 250), False),
        ("v.txt", None, True),
    ]
    assert [task.bytes for task in tasks] == [250, 100, 100, 50, 250]
    assert len({task.name for task in tasks}) == 5


def test_many_small_files_are_grouped_and_a_new_one_changes_one_group() -> None:
    random = Random(0)
    files = [stored(f"{random.getrandbits(64):016x}.txt", 1000) for _ in range(4 * MAX_UNGROUPED_FILES)]
    files.sort(key=lambda file: file.name)
    before = {task.name for task in plan(files)}
    assert sum(len(task.files) for task in plan(files)) == len(files)
    assert 5 < len(before) < 60  # 4,096 files, 256 a group on average
    more = sorted([*files, stored("8000.txt", 1000)], key=lambda file: file.name)
    after = {task.name for task in plan(more)}
    assert len(before - after) <= 1
    assert len(after - before) <= 2


def test_groups_are_of_one_split_and_leave_large_files_alone() -> None:
    files = [stored(f"{'v' if n % 3 == 0 else 'a'}{n:05d}.txt", 1000) for n in range(2 * MAX_UNGROUPED_FILES)]
    files.append(stored("large.txt", 2**21))
    for task in plan(sorted(files, key=lambda file: file.name)):
        assert {file.name.startswith("v") for file in task.files} == {task.is_validation}
        assert len(task.files) == 1 or all(file.bytes == 1000 for file in task.files)
