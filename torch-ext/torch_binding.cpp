// The extension module of kernel-builder's build. The operators register themselves, from csrc/binding,
// under the name that the builder gives to this build; an import has only to load them.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
