// The cache of keys and values: its memory, and the way in and out for what is not a step. kv.inl says how they lie in
// a page and attends them.
#include <cstring>

#include "engine/memory.h"
#include "engine/step.h"

namespace llama2 {
namespace {

float from_bf16(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t half_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half;
}

}  // namespace

KvCache::KvCache(KvType type, int64_t layers, int64_t heads, int64_t width, int64_t pages) : layers_(layers) {
  shape_.type = type;
  shape_.heads = heads;
  shape_.width = width;
  shape_.pages = pages;
  while (shape_.shift < 4 && (int64_t{1} << shape_.shift) < pages) ++shape_.shift;
  int64_t bytes = layers * heads * shape_.head_bytes();
  shape_.stride = pages >> shape_.shift ? (layers * heads | 1) * shape_.head_bytes() : bytes;  // odd: other cache sets
  memory_ = allocate(this->bytes());
}

KvLayer KvCache::layer(int64_t index) const {
  KvLayer l = shape_;
  l.data = memory_.get() + index * l.heads * l.head_bytes();
  return l;
}

void KvCache::copy_page(int64_t from, int64_t to) {
  if (from == to) return;
  for (int64_t i = 0; i < layers_; ++i) {
    KvLayer l = layer(i);
    for (int64_t h = 0; h < l.heads; ++h) {
      std::memcpy(l.key_page(h, to), l.key_page(h, from), l.key_bytes());
      std::memcpy(l.value_page(h, to), l.value_page(h, from), l.value_bytes());
    }
  }
}

void KvCache::copy_page_from(const KvCache& other, int64_t from, int64_t to) {
  for (int64_t i = 0; i < layers_; ++i) {
    KvLayer a = other.layer(i), b = layer(i);
    for (int64_t h = 0; h < b.heads; ++h) {
      std::memcpy(b.key_page(h, to), a.key_page(h, from), b.key_bytes());
      std::memcpy(b.value_page(h, to), a.value_page(h, from), b.value_bytes());
    }
  }
}

void KvCache::read(int64_t index, const int32_t* table, int64_t count, float* keys, float* values) const {
  KvLayer l = layer(index);
  int64_t wide = l.wide(), header = kv_scales(l.width);
  for (int64_t h = 0; h < l.heads; ++h)
    for (int64_t p = 0; p < count; ++p) {
      const uint8_t *k = l.key_page(h, table[p / PAGE]), *v = l.value_page(h, table[p / PAGE]);
      int64_t slot = p % PAGE;
      float *to_k = keys + (h * count + p) * l.width, *to_v = values + (h * count + p) * l.width;
      for (int64_t d = 0; d < l.width; ++d)
        if (l.type == KvType::F32) {
          std::memcpy(to_k + d, k + (d * PAGE + slot) * 4, 4);
          std::memcpy(to_v + d, v + (slot * wide + d) * 4, 4);
        } else if (l.type == KvType::BF16) {
          to_k[d] = from_bf16(half_at(k + d / 2 * 64 + slot * 4 + d % 2 * 2));
          to_v[d] = from_bf16(half_at(v + (slot / 2 * wide + d) * 4 + slot % 2 * 2));
        } else {
          int64_t scale = d / GROUP * 32 + slot * 2;
          int key = static_cast<int>(k[header + d / 4 * 64 + slot * 4 + d % 4]) - 128;
          to_k[d] = static_cast<float>(key) * from_bf16(half_at(k + scale));
          int value = static_cast<int8_t>(v[header + (slot / 4 * wide + d) * 4 + slot % 4]);
          to_v[d] = static_cast<float>(value) * from_bf16(half_at(v + scale));
        }
    }
}

void KvCache::write(int64_t index, const int32_t* table, int64_t past, int64_t count, const float* keys,
                    const float* values) {
  KvLayer l = layer(index);
  const Kernels* kernels = best_kernels();
  for (int64_t h = 0; h < l.heads; ++h)
    for (int64_t p = 0; p < count; ++p) {
      int64_t at = (h * count + p) * l.width, slot = past + p;
      kernels->kv_store(l, keys + at, values + at, h, table[slot / PAGE], static_cast<int>(slot % PAGE));
    }
}

}  // namespace llama2
