"""What the package offers, and what it does not drag in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gplq

SOURCES = sorted(Path(gplq.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", gplq.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(gplq, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = gplq.quantise


@pytest.mark.parametrize("code", ["import gplq", "import gplq.cli as c; c._parser().format_help()"])
def test_import_and_help_need_no_torch(code: str) -> None:
    check = f"{code}; import sys; print([m for m in ('torch', 'timm', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_module_never_imports_the_exporter(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert not [name for name in imported if name.split(".")[0] == "gplq_export"]


def test_public_names_do_not_turn_into_modules() -> None:
    # A submodule of the same name would replace the function as soon as it is imported.
    folder = Path(gplq.__file__).parent
    assert not [name for name in gplq.__all__ if (folder / f"{name}.py").exists()]
    program = "import gplq.pipeline; from gplq import quantize, load; assert callable(quantize) and callable(load)"
    subprocess.run([sys.executable, "-c", program], check=True)
