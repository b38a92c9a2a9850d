"""The machine: files, devices, console, compiled loops."""
