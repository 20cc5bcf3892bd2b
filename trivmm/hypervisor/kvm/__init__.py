"""The KVM back end: /dev/kvm through cffi, wrappers following the descriptors (system, VM, vCPU)."""
