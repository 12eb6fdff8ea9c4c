# What distributions ask of every library: a guard word behind arrays on the stack, tables of addresses
# that are read-only once it is loaded, a stack that cannot be executed. None of it is in a kernel's
# loop. tests/packaging/test_security.py reads it back from what was built.
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-fstack-protector-strong>")
add_link_options("LINKER:-z,relro,-z,now,-z,noexecstack")
