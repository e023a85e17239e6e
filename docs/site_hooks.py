"""What `make docs` adds to mkdocs: pages made of files outside docs/, and formulas as MathML, which browsers draw without a script.

Markdown is written for the repository's own view: links are relative to the file, maths is between dollars.
"""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # file -> page of the site
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"<code>([\w./-]+)</code>(?!</a>)")
OPERATORS = {r"\arg": r"\operatorname{arg}", r"\ln": r"\operatorname{ln}"}  # that latex2mathml does not know, or sets without space
MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds PAGES, and a page of every source file that a link or a `path` in the documentation names."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    texts = [(f, f.content_string) for f in files.documentation_pages()]
    for source in sorted({source for page, text in texts for source in _sources(page.src_uri, text)}):
        content = f"# `{source}`\n\n~~~~~~ {{.{_language(source)} linenums=1}}\n{(ROOT / source).read_text()}\n~~~~~~\n"
        files.append(File.generated(config, f"source/{source}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that lead out of docs/ lead to pages of the site."""
    here = page.file.src_uri
    return markdown if here.startswith("source/") else LINK.sub(lambda match: match[1] + _target(here, match[2], match[3] or "") + match[4], markdown)


def on_page_content(content, page, config, files):
    """TeX becomes MathML; the paths of files become links."""
    if page.file.src_uri.startswith("source/"):
        return content
    up = "../" * page.file.dest_uri.count("/")

    def linked(match):
        page = files.get_file_from_path(f"source/{match[1]}.md")
        return f'<a href="{up}{page.dest_uri}">{match[0]}</a>' if page else match[0]

    return CODE.sub(linked, MATHS.sub(lambda match: _mathml(match, page), content))


def _mathml(match, page):
    tex = html.unescape(match[3]).strip()
    for name, operator in OPERATORS.items():
        tex = re.sub(re.escape(name) + r"(?![a-z])", lambda _, operator=operator: operator, tex)
    try:
        maths = convert(tex, display="inline" if match[2] == "(" else "block")
    except Exception as error:  # latex2mathml raises many kinds
        raise PluginError(f"{page.file.src_uri}: latex2mathml cannot read {tex!r}: {type(error).__name__}: {error}") from error
    if "\\" in maths:
        raise PluginError(f"{page.file.src_uri}: latex2mathml leaves TeX of {tex!r}; see OPERATORS in docs/site_hooks.py")
    return maths


def _repository_path(page, link):
    """The file of the repository that a link of a page means."""
    origin = {page_uri: source for source, page_uri in PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _target(page, link, anchor):
    if "://" in link or link.startswith("mailto:"):
        return link + anchor
    path = _repository_path(page, link)
    if path in PAGES:
        return PAGES[path] + anchor
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + anchor
    return f"source/{path}.md" + anchor.replace("#L", "#__codelineno-0-")


def _sources(page, text):
    """Paths of text files outside docs/ that the page's links and `code` name."""
    links = [_repository_path(page, match[2]) for match in LINK.finditer(text) if "://" not in match[2]]
    named = re.findall(r"`([\w./-]+)`", text)
    for path in links + named:
        file = ROOT / path
        if path not in PAGES and not path.startswith("docs/") and file.is_file() and not {".png", ".safetensors"} & {file.suffix}:
            yield path


def _language(path):
    return {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".cu": "cuda", ".cuh": "cuda", ".cpp": "cpp", ".h": "cpp"}.get(Path(path).suffix, "text")
