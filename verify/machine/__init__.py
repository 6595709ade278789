"""The machine: versions, devices, ranks, terminal, files, and errors of use."""
