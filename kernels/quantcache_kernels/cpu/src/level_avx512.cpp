#include "attend.h"
#include "encode.h"

namespace quantcache {
extern const Level avx512_level = {"avx512", encode_scratch, encode, attend_scratch, attend, merge};
} // namespace quantcache
