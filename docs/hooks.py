"""For mkdocs: what of a page means something else on the site than in a repository browser.

Pages link to files of the repository, ``[its tests](../tests/ptx)``, which are no part of the site.
There such a link becomes one to the repository if mkdocs.yml knows its ``repo_url``; else the name
of the file stands in its place.
"""

import posixpath
import re

# [text](../path) and [text](../path#part), images left out
OUT_OF_DOCS = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Called by mkdocs for every page."""

    def rewritten(link: re.Match) -> str:
        text, target = link.groups()
        path = posixpath.normpath(
            posixpath.join("docs", posixpath.dirname(page.file.src_uri), target)
        )
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        name = text.strip("`")
        return f"`{path}`" if name in path or path in name else f"{text} (`{path}`)"

    return OUT_OF_DOCS.sub(rewritten, markdown)


def on_page_content(html: str, *, page, config, files) -> str:
    """Called with what a page has become. Roles of Sphinx in docstrings: the name alone is left."""
    return re.sub(r":(?:class|func):(?=<code>)", "", html)
