#include "attend.h"
#include "decode.h"
#include "encode.h"

namespace quantcache {
extern const Level plain_level = {
    "plain", encode_scratch, encode, attend_scratch, attend, merge, decode_scratch, decode};
} // namespace quantcache
