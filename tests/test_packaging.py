"""The source distribution and the wheel hold real files, and the wheel works where the repository is not."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from veomni.version import __version__

ROOT = Path(__file__).parents[1]
LINKED = ("strategies", "accelerators")
SOURCES = ("veomni", *LINKED, "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, links kept as links, the wheel from the source distribution as ``python -m build`` does."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    assert (copy / "veomni" / "strategies").is_symlink()
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", str(copy)], check=True, capture_output=True, text=True
    )
    return copy / "dist"


def linked_files() -> dict[str, bytes]:
    """Path inside the package and content of every file behind the two links."""
    return {f"veomni/{name}/{path.name}": path.read_bytes() for name in LINKED for path in (ROOT / name).glob("*.py")}


def test_the_source_distribution_holds_real_files(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert not [name for name, member in members.items() if member.issym() or member.islnk()]
        for name, content in linked_files().items():
            file = archive.extractfile(members[name])
            assert file is not None
            assert file.read() == content, name
    assert "LICENSE" in members


def test_the_wheel_holds_real_files(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        assert not [info.filename for info in wheel.infolist() if stat.S_ISLNK(info.external_attr >> 16)]
        for name, content in linked_files().items():
            assert wheel.read(name) == content, name
        assert {"veomni/py.typed", "veomni/launch/exec_rank.py"} <= set(wheel.namelist())
        assert wheel.read(f"veomni-{__version__}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert {name.split("/")[0] for name in wheel.namelist()} == {"veomni", f"veomni-{__version__}.dist-info"}


def test_the_wheel_works_in_a_clean_environment(dist: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         str(next(dist.glob("*.whl")))],
        check=True,
    )  # fmt: skip
    own = next(environment.glob("lib/python*/site-packages"))
    # Dependencies come from here. Files that end in .pth are not read there, so the editable veomni is not found.
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    shown = subprocess.run(
        [str(python), "-I", "-c", PROGRAM], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    )
    found = json.loads(shown.stdout)
    assert found["version"] == __version__
    assert [Path(path).is_relative_to(own) for path in found["files"]] == [True, True, True], found
    assert found["plugins"] == {"CPU": "cpu", "FSDP2": "fsdp2"}


PROGRAM = """
import json
import veomni, veomni.strategies, veomni.accelerators
from importlib.metadata import entry_points
print(json.dumps({
    "version": veomni.__version__,
    "files": [veomni.__file__, veomni.strategies.__file__, veomni.accelerators.__file__],
    "plugins": {point.load().__name__: name
                for group, name in (("accelerators", "cpu"), ("strategies", "fsdp2"))
                for point in entry_points(group=f"veomni.{group}", name=name)},
}))
"""
