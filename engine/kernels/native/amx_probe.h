// Whether AMX can be used here; asked by dispatch.cpp, once.
#pragma once

#include "kernels.h"

// The processor and the kernel name it.
bool amx_is_promised();

// Asks the kernel for tiles for this process and its threads; tiles fault without.
bool amx_is_permitted();

// A child process multiplies with these functions; false if it dies, hangs for two seconds or is wrong.
bool survives_probe(const Functions *functions);
