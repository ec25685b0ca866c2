"""The Triton kernels and their launcher: README.md has the drawing. Imported when a kernel first runs."""
