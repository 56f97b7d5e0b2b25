"""Laws of the documents: what they point to exists, and what they list is complete.

tests/test_snippets.py has the laws of the commands and programs in them.
"""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from trainer.config.refusals import setting_names
from trainer.config.settings import Config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trainer"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "docker/README.md")), *DOCS]
# What looks like a setting and is not: functions of Keras, and files of others.
NOT_SETTINGS = ("model.compile", "model.fit", "tokenizer.json")
ALL_TESTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(path: Path) -> list[str]:
    """What stands in backticks in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def links(path: Path) -> list[tuple[str, str]]:
    """The links of a page: what is shown, and where each leads."""
    return re.findall(r"\[([^][]*)\]\(([^()\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def modules_of(room: str) -> set[str]:
    """The names of a room's modules, such as `loop`, or `ops/cpu` in a folder; '' is the package itself."""
    paths = (PACKAGE / room).rglob("*.py") if room else PACKAGE.glob("*.py")
    names = {str(path.relative_to(PACKAGE / room).with_suffix("")) for path in paths}
    return {name for name in names if not name.endswith("__init__")}


ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def mapped_modules(text: str) -> dict[str, set[str]]:
    """The rooms of README's map with the modules that it names in each."""
    rows = re.findall(r"^\| \[\w+/\]\(trainer/(\w*)/?\) \|.*\| ([^|]+) \|$", text, flags=re.M)
    return {room: set(modules.replace("`", "").split()) for room, modules in rows}


def test_the_map_in_readme_names_every_room_and_module_and_no_other():
    assert mapped_modules(text_of("README.md")) == {room: modules_of(room) for room in ("", *ROOMS)}


def test_readme_is_read_in_two_minutes():
    assert len(text_of("README.md").splitlines()) <= 120


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_every_link_leads_somewhere(path: Path):
    for shown, target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"[{shown}]({target})"
        assert not anchor or anchor in anchors(there), f"[{shown}]({target})"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_test_that_is_named_exists(path: Path):
    linked = {shown.strip("`"): target for shown, target in links(path)}
    for span in spans(path):
        if re.fullmatch(r"test_\w+", span):
            files = [(path.parent / linked[span]).resolve()] if span in linked else list(ALL_TESTS)
            assert any(f"def {span}(" in ALL_TESTS[file] for file in files), span


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_of_the_repository_that_is_named_exists(path: Path):
    for span in spans(path):
        if re.fullmatch(r"(trainer|tests|scripts|configs|docs|docker)/[\w./-]*", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_setting_that_is_named_exists(path: Path):
    sections = set(Config.model_fields) - {"run_folder"}
    for span in spans(path):
        name = re.match(rf'"?((?:{"|".join(sections)})\.\w+)(?= ?=|$)', span)
        assert name is None or span in NOT_SETTINGS or name[1] in set(setting_names()), span


def promises() -> list[tuple[str, str]]:
    """The promises of docs/guarantees.md: their headings, and what stands below each."""
    _, *sections = text_of("docs/guarantees.md").partition("\n## What is not promised")[0].split("\n## ")
    return [(heading, body) for heading, _, body in (section.partition("\n") for section in sections)]


@pytest.mark.parametrize(("heading", "body"), promises(), ids=[heading for heading, _ in promises()])
def test_every_promise_names_its_test(heading: str, body: str):
    assert re.search(r"^- \[`test_\w+`\]\(\.\./tests/test_\w+\.py\)$", body, flags=re.M)


@pytest.mark.parametrize(
    ("name", "pages"),
    [("README.md", [*DOCS, ROOT / "README.ko.md", ROOT / "CONTRIBUTING.md"]), ("docs/README.md", PAGES)],
)
def test_every_page_is_linked_from_the_first_ones(name: str, pages: list[Path]):
    linked = {(ROOT / name).parent.joinpath(target).resolve() for _, target in links(ROOT / name)}
    assert {*pages} - {ROOT / name} <= linked


def own_text_config(name: str) -> dict[str, object]:
    """The config that a first page shows whole."""
    (block,) = re.findall(r"^```toml\n(# mine\.toml\n.*?)^```$", text_of(name), flags=re.M | re.S)
    return tomllib.loads(block)


def test_the_korean_first_page_shows_the_same_config_and_first_commands():
    assert own_text_config("README.ko.md") == own_text_config("README.md")
    first = [
        re.findall(r"^```sh\n(.*?)^```$", text_of(name), flags=re.M | re.S)[0] for name in ("README.md", "README.ko.md")
    ]
    assert first[0] == first[1]


def test_the_picture_of_the_rooms_has_every_room_in_the_order_of_their_layers():
    (picture,) = re.findall(
        r"^```mermaid\n(.*?\bcommands\b.*?)^```$", text_of("docs/architecture.md"), flags=re.M | re.S
    )
    arrows = dict(re.findall(r"^ +(\w+)(?:\[.*?\])? --> (\w+)", picture, flags=re.M))
    from_the_top = ["cli"]
    while from_the_top[-1] in arrows:
        from_the_top.append(arrows[from_the_top[-1]])
    # A module of the top level that is not drawn by itself belongs to the command and the library.
    (rooms,) = re.findall(r"^ROOMS = (\(.*?^\))", text_of("tests/test_layers.py"), flags=re.M | re.S)
    layers = [name.removeprefix("trainer.") for name in ast.literal_eval(rooms)]
    assert from_the_top[:0:-1] == [name for name in layers if name in {*ROOMS, "execution"}]
