import sys

from setuptools import setup

sys.path.insert(0, "ffi")
from build_guest import BuildExtWithGuest, BuildWithGuest

# cffi_modules and cmdclass are keywords that pyproject.toml cannot express.
setup(
    cffi_modules=["ffi/build_ffi.py:ffibuilder"], cmdclass={"build_py": BuildWithGuest, "build_ext": BuildExtWithGuest}
)
