#include "attend.h"
#include "decode.h"
#include "encode.h"

namespace quantcache {
extern const Level avx2_level = {
    "avx2", encode_scratch, encode, attend_scratch, attend, merge, decode_scratch, decode};
} // namespace quantcache
