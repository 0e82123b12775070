"""Build an image and run it with what this machine has: docker, podman or buildah.

Two variables say what, so that no path of a machine gets into a result:
`TSMOE_IMAGE_BUILDER`, the command (`docker`, `podman`, `buildah --root DIR`), and
`TSMOE_IMAGE_BUILD_OPTIONS`, what each build here needs besides (mounts, network, proxies).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKSPACE = "/workspace"
"""Where the image works, as its Dockerfile says."""


@dataclass(frozen=True, kw_only=True)
class ContainerBuilder:
    """One of the three programs behind one face."""

    command: tuple[str, ...]
    build_options: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> ContainerBuilder | None:
        """Read both variables; None where the first is not set."""
        command = shlex.split(os.environ.get("TSMOE_IMAGE_BUILDER", ""))
        options = shlex.split(os.environ.get("TSMOE_IMAGE_BUILD_OPTIONS", ""))
        return cls(command=tuple(command), build_options=tuple(options)) if command else None

    @property
    def name(self) -> str:
        """The program, without the folder it lies in."""
        return Path(self.command[0]).name

    def version(self) -> str:
        """What the program says of itself."""
        return self._output("--version")

    def build(self, tag: str, context: Path, *options: str) -> str:
        """Build the Dockerfile of a checkout and return the log.

        Raises:
            RuntimeError: if it failed, with the end of the log.
        """
        # Without that format buildah and podman drop the health check.
        verb = {"buildah": ["bud", "--layers", "--format", "docker"]}.get(self.name, ["build"])
        verb += ["--format", "docker"] if self.name == "podman" else []
        done = subprocess.run(
            [*self.command, *verb, *self.build_options, *options,
             "--file", str(context / "docker/Dockerfile"), "--tag", tag, str(context)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self.name} could not build {tag}:\n{done.stdout[-4000:]}")
        return done.stdout

    def run(
        self,
        tag: str,
        words: Sequence[str],
        *,
        mounts: Mapping[Path, str] | None = None,
        user: str | None = None,
        uses_entrypoint: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Do what `docker run --rm TAG WORDS` does, and return what it printed."""
        options = [f"--volume={here}:{there}" for here, there in (mounts or {}).items()]
        options += [f"--user={user}"] if user else []
        if self.name != "buildah":
            words = list(words)
            if not uses_entrypoint:
                options.append(f"--entrypoint={words.pop(0)}")
            return self._finish([*self.command, "run", "--rm", *options, tag, *words])
        # buildah runs single commands in a working container and knows no entry point.
        entry = self.settings(tag)["Entrypoint"] if uses_entrypoint else []
        container = self._output("from", "--pull-never", tag)
        try:
            return self._finish([*self.command, "run", *options, container, "--", *entry, *words])
        finally:
            self._output("rm", container)

    def settings(self, tag: str) -> dict[str, Any]:  # Any: values of JSON
        """Return the image's own settings: `User`, `Entrypoint`, `Healthcheck`, `Labels`, .."""
        if self.name == "buildah":
            return json.loads(self._output("inspect", "--type", "image", tag))["Docker"]["config"]
        return json.loads(self._output("image", "inspect", tag))[0]["Config"]

    def remove(self, tag: str) -> None:
        """Delete the image."""
        self._output("rmi", "--force", tag)

    def _output(self, *arguments: str) -> str:
        done = self._finish([*self.command, *arguments])
        if done.returncode:
            raise RuntimeError(f"{self.name} {arguments[0]} failed: {done.stderr.strip()[-1000:]}")
        return done.stdout.strip()

    def _finish(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False)
