// cuda_bf16.h - found instead of NVIDIA's by the host build.
#pragma once
#include "half.h"
