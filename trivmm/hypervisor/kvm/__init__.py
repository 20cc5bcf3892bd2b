"""The KVM back end: /dev/kvm through cffi."""
