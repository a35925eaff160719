"""One file per operation: launcher, dispatch, reference. C++ twins live in csrc/cpu."""
