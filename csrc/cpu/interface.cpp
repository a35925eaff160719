// The digest of the functions that this library exports (csrc/declarations.py), so that Python refuses one that was built
// from others.
extern "C" __attribute__((visibility("default"))) const char* kvevict_interface() { return KVEVICT_INTERFACE; }
