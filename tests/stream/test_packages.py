import sys
from pathlib import Path

import pytest

from sae.stream.packages import package_files, package_folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package whose code fails, so that importing it would show."""
    folder = tmp_path / "some_texts"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("1_news.csv.zst", "2_news.csv", "3_poems.csv", "notes.md"):
        (folder / "data" / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_package_folder_finds_without_importing(package: Path) -> None:
    assert package_folder("package:some-texts") == package
    assert "some_texts" not in sys.modules


def test_package_files_match_each_glob(package: Path) -> None:
    def names(globs: str | None) -> list[str]:
        files = package_files("package:some-texts", globs, (".csv", ".csv.zst"))
        return [path.name for path in files]

    assert names(None) == ["1_news.csv.zst", "2_news.csv", "3_poems.csv"]
    assert names("1_news*, 3_*") == ["1_news.csv.zst", "3_poems.csv"]
    assert package.is_dir()


@pytest.mark.usefixtures("package")
def test_a_glob_without_files_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"4_\*.*2_news\.csv"):
        package_files("package:some-texts", "2_*,4_*", (".csv",))


def test_missing_package_says_how_to_install() -> None:
    with pytest.raises(RuntimeError, match=r"pip install --no-deps no-such-package"):
        package_folder("package:no-such-package")


@pytest.mark.parametrize("name", ["", "a.b", "x==1", "../x"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="package:NAME"):
        package_folder(f"package:{name}")
