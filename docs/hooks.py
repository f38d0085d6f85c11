"""Links that leave docs/: on a forge they lead to the file, on the site to a page that shows it. And side bars."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)#\s]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".service": "ini", ".sh": "sh"}

_NOT_FOUND_BY_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"


def _name_on_site(target: Path, docs: Path) -> str:
    if docs in target.parents:
        return target.relative_to(docs).as_posix()
    return f"files/{target.relative_to(docs.parent).as_posix()}.md"


def _led(markdown: str, source: Path, docs: Path) -> tuple[str, list[Path]]:
    """What a file says, with its links as they are on the site; and which files outside docs/ it names."""
    here, outside = posixpath.dirname(_name_on_site(source, docs)), []

    def lead(found: re.Match[str]) -> str:
        target = (source.parent / found[0]).resolve()
        if docs.parent not in target.parents or not target.is_file():
            return found[0]  # mkdocs has a word to say about it
        if docs not in target.parents:
            outside.append(target)
        return posixpath.relpath(_name_on_site(target, docs), here or ".")

    return _LINK.sub(lead, markdown), outside


def on_files(files: Files, config: Any) -> Files:
    docs = Path(config.docs_dir).resolve()
    pages = [(docs / file.src_uri, file.content_string) for file in files.documentation_pages()]
    while pages:
        source, said = pages.pop()
        for target in _led(said, source, docs)[1]:
            name = _name_on_site(target, docs)
            if files.get_file_from_path(name) is None:
                text = target.read_text(encoding="utf-8")
                if target.suffix == ".md":
                    pages.append((target, text))
                    text = _led(text, target, docs)[0]
                else:
                    language = _LANGUAGES.get(target.suffix, "text")
                    text = f"{_NOT_FOUND_BY_SEARCH}# {target.name}\n\n```{language}\n{text.rstrip()}\n```\n"
                files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.parent is None:  # alone under its tab: the room of the left side bar is better given to code
        page.meta.setdefault("hide", ["navigation"])
    docs = Path(config.docs_dir).resolve()
    if page.file.generated_by is not None:
        return markdown
    return _led(markdown, docs / page.file.src_uri, docs)[0]
