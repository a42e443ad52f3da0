"""Builds the native kernels along with the package. Without a compiler the package installs all the same."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Read, not imported: nothing that `engine` needs is there while the package is being built.
KERNELS = runpy.run_path(str(Path(__file__).parent / "engine" / "kernels" / "compile.py"))


class BuildKernels(build_ext):
    """One shared object for ctypes, not a module: no interpreter's version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            KERNELS["build"](target)
        except KERNELS["CompileError"] as error:
            self.warn(f"the native kernels were not built, torch computes in their place: {error}")


setup(
    ext_modules=[Extension("engine.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
    package_data={"engine.kernels": ["native/*"], "gateway.http.page": ["page.html"], "k8s": ["**/*.yaml"]},
)
