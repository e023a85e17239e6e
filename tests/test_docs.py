"""The documentation names files, tests, functions, commands, flags and settings that there are."""

import ast
import dataclasses
import functools
import re
import unicodedata
from pathlib import Path

import pytest
import yaml

from proxt2i.config import Config
from proxt2i.curation.config import Curation
from proxt2i.grpo_config import GrpoConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("benchmarks/out", "proxt2i/ops/attention_table.json", "proxt2i/_C")
PLACEHOLDER = re.compile(r"NAME|DEVICE|DATE")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def spans(page: Path) -> list[str]:
    """`code` in the running text."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def commands(page: Path) -> list[str]:
    """Lines of its shell blocks, joined where they go on, without comments."""
    blocks = [text for language, text in FENCE.findall(page.read_text()) if language == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = unicodedata.normalize("NFC", re.sub(r"[`*]|\$", "", heading)).lower().strip()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def defined(path: Path) -> set[str]:
    """Names that a source file gives to functions, classes, methods and fields."""
    nodes = list(ast.walk(tree(path)))
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


@each_page
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"{page.name}: {link} does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in [slug(h) for h in re.findall(r"^#+ (.*)", FENCE.sub("", target.read_text()), re.MULTILINE)], f"{page.name}: {link}#{anchor}"


@each_page
def test_files_and_tests_that_are_named_exist(page):
    for span in spans(page):
        if re.fullmatch(r"(proxt2i|launchers|configs|tests|benchmarks|csrc|docs|docker|\.ci)/[\w./*-]+", span) and not span.startswith(GENERATED) and not PLACEHOLDER.search(span):
            assert list(ROOT.glob(span.rstrip("/"))), f"{page.name}: `{span}` does not exist"
    tests = set().union(*(defined(file) for file in ROOT.glob("tests/**/*.py")))
    for span in spans(page):
        if re.fullmatch(r"test_\w+…?", span):
            named = {test for test in tests if test.startswith(span[:-1])} if span.endswith("…") else tests & {span}
            assert named, f"{page.name}: there is no test `{span}`"


SAMPLERS = {"euler_maruyama", "euler_ode", "ddim", "ddpm", "variance_preserving"}
PARAMETERS = {"guidance_scale", "eps_fn"}


def test_the_mathematics_names_code_that_there_is():
    page = ROOT / "docs" / "mathematics.md"
    sources = {file: defined(file) for file in ROOT.glob("proxt2i/**/*.py")}
    everywhere = set().union(*sources.values())
    checked = 0
    for span in spans(page):
        name = re.fullmatch(r"(?:\w*\.)?([A-Za-z_]\w*)(?:\([^)]*\))?", span)
        if name and ("_" in span or "." in span or span != span.lower()) and not span.startswith("diffusion.") and name[1] not in SAMPLERS:
            checked += 1
            assert name[1] in everywhere | PARAMETERS, f"mathematics.md: nothing is called `{span}`"
    for names, path in re.findall(r"((?:`[^`\n]+`(?:, | and | of )?)+) in `(proxt2i/[\w/]+\.py)`", page.read_text().replace("\n", " ")):
        for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", names):
            checked += 1
            assert name in sources[ROOT / path], f"mathematics.md: `{name}` is not in {path}"
    assert checked > 40


def strings(path: Path) -> set[str]:
    """String constants of a module of ours and of those that it imports."""
    files = {path}
    for node in ast.walk(tree(path)):
        modules = []
        if isinstance(node, ast.ImportFrom):
            base = path.parent.joinpath(*[".."] * (node.level - 1)).resolve() if node.level else ROOT
            base = base.joinpath(*(node.module or "").split(".")) if node.module else base
            modules = [base, *(base / alias.name for alias in node.names)]
        for module in modules:
            files |= {file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file() and file.is_relative_to(ROOT)}
    return {node.value for file in files for node in ast.walk(tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def entry(command: str) -> Path | None:
    """The file that a line of shell starts, if it is ours."""
    script = re.search(r"(?:python|deepspeed|torchrun|srun)\b.*?\s(?:/opt/proxt2i/)?((?:proxt2i|benchmarks|launchers)/\w+\.py)", command)
    module = re.search(r"-m ((?:proxt2i|launchers)[\w.]*)", command)
    if module and (not script or module.start() < script.start(1)):
        path = ROOT.joinpath(*module[1].split("."))
        return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return ROOT / script[1] if script else None


@each_page
def test_commands_and_their_flags_exist(page):
    for command in commands(page):
        path = entry(command)
        if path is None:
            continue
        assert path.is_file(), f"{page.name}: {command}: no {path.relative_to(ROOT)}"
        ours = command[command.index(path.stem if path.stem != "__main__" else path.parent.name):].split(" -- ")[0]
        known = strings(path)
        for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", ours.split("|")[0].split("&&")[0]):
            assert flag in known or flag == "--help", f"{page.name}: {command}: {flag} is no flag of {path.relative_to(ROOT)}"
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|[`\n])make ([a-z][\w-]*)", page.read_text()):
        assert target in targets, f"{page.name}: make {target}"


def keys(cls) -> set[str]:
    return {f"{section.name}.{field.name}" for section in dataclasses.fields(cls) for field in dataclasses.fields(section.default_factory)}


@each_page
def test_settings_exist(page):
    known = set().union(*map(keys, (Config, GrpoConfig, Curation)))
    sections = {key.split(".")[0] for key in known}
    text = "\n".join([*spans(page), *commands(page)])
    for section, field in re.findall(rf"(?:^|[\s(])({'|'.join(sections)})\.([a-z]\w*)(?=[=\s:,)]|$)", text):
        is_file = field in ("py", "json", "jsonl", "yaml", "txt")
        assert is_file or f"{section}.{field}" in known, f"{page.name}: there is no setting {section}.{field}"


def test_the_site_shows_every_page():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    listed = set(re.findall(r"[\w-]+\.md", str(config["nav"]))) - {"index.md", "contributing.md", "changelog.md"}
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - listed
    assert not missing, f"mkdocs.yml's nav lacks {missing}"
