// As csrc/cpu/interface.cpp.
extern "C" __attribute__((visibility("default"))) const char* kvevict_interface() { return KVEVICT_INTERFACE; }
