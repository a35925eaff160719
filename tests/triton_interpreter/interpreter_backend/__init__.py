"""Triton's interpreter as a backend of Triton, so that vLLM's model runner V2 runs on a machine without a GPU.

On CPU, vLLM uses Triton only if that lists a backend named "cpu". This one compiles nothing: with TRITON_INTERPRET=1
every kernel runs in Python. Triton finds it by the entry point beside this package, as it finds its own, in every
process that has the folder of both on its path: tests/conftest.py puts it there.
"""

from interpreter_backend.speed import hurry_when_imported

hurry_when_imported()
