"""Kernels of users and of others that run in a process of their own.

process           our side: the worker process, questions and answers, limits, what its death means
worker            the other side: a loop that answers questions; imports nothing of ours
python_kernel     `py:FILE.py::FUNCTION`, with python_servant on the other side
merge_kernel      `merge:FILE.py::FUNCTION`, with merge_servant on the other side
function_kernel   a callable of this process; user_kernel: what both have in common
forms             how a callable is called: its names, order of dimensions, and how it sees keys
cheats            ways to look right without being it; cheat_servant runs them beside the kernel
ggml_kernel       `ggml:lib=FILE`, with ggml_servant on the other side
"""
