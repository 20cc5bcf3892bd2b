"""What runs guest code: one small protocol (`base`), and the back ends that implement it."""
