from setuptools import setup

# cffi_modules is a keyword that pyproject.toml cannot express.
setup(cffi_modules=["ffi/build_ffi.py:ffibuilder"])
