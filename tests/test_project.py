"""What the package says about itself: one version, and a page that stands alone."""

import re
import tomllib
from pathlib import Path

import minilora as ml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_page_of_the_package_index_points_to_nothing_beside_it():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    page = README
    for substitution in hook["substitutions"]:
        page = re.sub(substitution["pattern"], substitution["replacement"], page)
    assert "![" not in page and not re.search(r"\]\((?!https?:)", page)
    assert "minilora/lora/layer.py" in page and "](https://arxiv.org" in page


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert ml.__version__ == version
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
