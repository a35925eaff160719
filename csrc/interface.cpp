// The digest of the functions that a library exports (csrc/declarations.py), so that Python refuses one that was built from
// others. Both libraries have it.
extern "C" __attribute__((visibility("default"))) const char* kvevict_interface() { return KVEVICT_INTERFACE; }
