"""Every page of docs/ is in the site's navigation, and every link and anchor of a page goes somewhere.

`make docs` builds the site and is stricter still; this needs nothing that is not installed anyhow.
`python tests/test_site.py` writes the generated part of docs/choose.md anew.
"""

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# with links to our own repository
OTHERS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "pyproject.toml",
    "examples/plugin/README.md",
    ".github/ISSUE_TEMPLATE/bug.yml",
    ".github/ISSUE_TEMPLATE/method.yml",
]
REPOSITORY = re.compile(
    r"https://(?:github|raw\.githubusercontent)\.com/ndlora-plugins/ndlora-plugins/"
    r"(?:blob/|tree/|)main/([^\s)#\"]+)(?:#([^\s)\"]+))?"
)
PICTURES = "../benchmarks/"  # docs/pictures.py puts them into the site
PART = re.compile(r"(<!-- which: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def prose(path):
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path, target):
    """Whether a relative link of a page goes nowhere."""
    name, _, anchor = target.partition("#")
    found = path.parent / name if name else path
    return not found.exists() or bool(anchor) and anchor not in anchors(found)


def in_navigation(entries):
    for entry in entries:
        (value,) = entry.values()
        yield from in_navigation(value) if isinstance(value, list) else [value]


def table_of_the_readme():
    """README's answer to "Which one"."""
    section = (ROOT / "README.md").read_text().partition("## Which one\n")[2].partition("\n## ")[0]
    lines = section[: section.rindex("\n\nAll ")].strip()
    return f"{lines}\n"


def choose_page():
    return PART.sub(
        lambda found: found[1] + table_of_the_readme() + found[2], (DOCS / "choose.md").read_text()
    )


def test_every_page_is_in_the_navigation_once():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(in_navigation(navigation)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page(page):
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(DOCS / page))
    assert [target for target in targets if broken(DOCS / page, target)] == []
    # the site holds docs/ and pictures only: all else of the repository by its address
    assert [target for target in targets if target.startswith("..") and PICTURES not in target] == []


@pytest.mark.parametrize("name", [*(f"docs/{page}" for page in PAGES), *OTHERS])
def test_addresses_in_our_own_repository(name):
    addresses = REPOSITORY.findall((ROOT / name).read_text())
    assert [found for found in addresses if broken(ROOT / "README.md", "#".join(filter(None, found)))] == []


def test_the_choice_is_the_readmes():
    page = (DOCS / "choose.md").read_text()
    assert "| the default" in page and page == choose_page()


if __name__ == "__main__":
    (DOCS / "choose.md").write_text(choose_page())
