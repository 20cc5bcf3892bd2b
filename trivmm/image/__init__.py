"""What a guest boots into, made without root: an initramfs from a distribution's packages, a cloud-init seed.

A :class:`~trivmm.image.tree.Tree` is a file system in memory; who makes one (``userland``, from a kernel's package and
a static busybox) knows nothing of the format that it becomes (``cpio``). ``package`` takes Debian packages apart and
trusts nothing in them. All output is a function of the input: the same files give the same bytes, with
``SOURCE_DATE_EPOCH`` as the only clock. Nothing here runs a VM or imports what does.
"""
