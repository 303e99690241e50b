#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // false alarms in GCC 12's own header
#endif
#include "attend.h"
#include "decode.h"
#include "encode.h"

namespace quantcache {
extern const Level avx512_level = {
    "avx512", encode_scratch, encode, attend_scratch, attend, merge, decode_scratch, decode};
} // namespace quantcache
