"""A toy device: what a new kind of device takes, in one folder. Nobody's VM has it; the tests add the one line.

It hands out entropy like virtio-rng, under a device type that no driver knows.
"""
