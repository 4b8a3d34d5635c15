"""What pyproject.toml cannot say: which folder is which package, and a long description that reads well off GitHub.

kernels/ is installed as convwave.kernels and data/given_names/ as convwave.given_names: a top-level package called
"kernels" would clash with others of that name. Everything else is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/convwave/convwave"
PICTURES = "https://raw.githubusercontent.com/convwave/convwave/HEAD"


def absolute_links(markdown: str) -> str:
    """README.md for a package index: links and pictures of the checkout become addresses in the repository."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if picture:
            return f"![{text}]({PICTURES}/{target})"
        view = "tree" if (HERE / target).is_dir() else "blob"
        return f"[{text}]({REPOSITORY}/{view}/HEAD/{target.rstrip('/')})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, markdown)


setup(
    long_description=absolute_links((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["convwave", "convwave.*"]), "convwave.kernels", "convwave.given_names"],
    package_dir={"convwave": "convwave", "convwave.kernels": "kernels", "convwave.given_names": "data/given_names"},
    package_data={"convwave": ["py.typed"], "convwave.given_names": ["*.txt"]},
)
