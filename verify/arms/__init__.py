"""What ppl and gen share: arms, what is watched in them, and a kernel's own error."""
