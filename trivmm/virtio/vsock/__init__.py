"""virtio-vsock: streams between the guest's vsock sockets and unix sockets of the host."""
