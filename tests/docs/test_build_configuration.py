"""docs/configuration.md is what its generator writes from the code as it is."""

from shoestring.docs.build_configuration import PAGE, ROOT, configuration_page, head_comment


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == configuration_page(), "run `python docs/build_configuration.py`, which rewrites the page"


def test_every_choice_has_a_comment_at_its_head() -> None:
    assert not [str(file) for file in sorted((ROOT / "conf").glob("*/*.yaml")) if not head_comment(file)]


def test_nested_keys_optional_values_and_required_ones() -> None:
    cells = [[cell.strip(" `") for cell in line.split("|")] for line in PAGE.read_text().splitlines()]
    rows = {row[1]: row[2:5] for row in cells if len(row) > 4}
    assert rows["model.rope_scaling"] == ["group or null", "", "null"]
    assert rows["model.rope_scaling.factor"] == ["float", "at least 1", "40.0"]
    assert rows["schedule.layers_per_stage"] == ["list[int] or null", "", "null"]
    assert rows["training.mtp_loss_scaling_factor"] == ["dict[int, float]", "", "{0: 0.3}"]
    assert rows["data.corpus"] == ["str", "not empty", "required"]
    assert rows["telemetry.prometheus.port"] == ["int or null", "1 to 65,535", "null"]
