// cuda_fp16.h - found instead of NVIDIA's by the host build.
#pragma once
#include "half.h"
