#include "attend.h"
#include "encode.h"

namespace quantcache {
extern const Level plain_level = {"plain", encode_scratch, encode, attend_scratch, attend, merge};
} // namespace quantcache
