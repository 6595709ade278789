"""`verify gen`: greedy text from two kernels, and why it comes to differ where it does."""
