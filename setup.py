import sys
import sysconfig

from setuptools import setup

sys.path.insert(0, "ffi")
from build_check import check
from build_guest import BuildExtWithGuest, BuildWithGuest

check(sys.argv[1:])
# The C uses Python's stable ABI only (cffi sees to it), except where a Python without a GIL has none.
STABLE_ABI = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}

# cffi_modules, cmdclass and options that depend on the Python are keywords that pyproject.toml cannot express.
setup(
    cffi_modules=["ffi/build_ffi.py:ffibuilder"],
    cmdclass={"build_py": BuildWithGuest, "build_ext": BuildExtWithGuest},
    options=STABLE_ABI,
)
