"""How a guest begins: kernel images, PVH boot data, ACPI tables."""
