"""Debian packages, taken apart without dpkg and without trust.

Where they are (``fetch``), the archive (``deb``, ``tar``, ``packed``), the kernel modules in it (``modinfo``,
``modules``).
"""
