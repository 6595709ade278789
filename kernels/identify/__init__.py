"""Reading an arithmetic off a kernel, from q, k, v and out alone (`docs/identify.md`)."""
