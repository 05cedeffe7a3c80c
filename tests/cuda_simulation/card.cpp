// SPDX-License-Identifier: Apache-2.0
// A CUDA device in main memory, for CPU builds of torch: tensors on "cuda:0" are real, their kernels are the CPU's.
//
//   memory      an allocator with a limit and a peak; memory that nobody has written is NaN
//   pinned      host memory that the card reads and writes by itself, allocated so or registered
//   generators  torch.Generator("cuda"), and the card's own default generator
//   waits       the host waiting for the card: counted, or an error, as torch.cuda.set_sync_debug_mode says
//   hooks       what torch asks a CUDA build for
//   fallback    every operator without a kernel here: the CPU's on the same bytes, devices checked
//   kernels     operators that make tensors, views and copies
//   processes   several of them, each with a card, by gloo
//   interface   functions for tests/cuda_simulation (ctypes)
//
// Loaded before torch is imported (torch asks for its hooks once); symbols of torch are found in libraries loaded earlier.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace simulated {
using namespace at;

const Device kCard(DeviceType::CUDA, 0);
constexpr size_t kGranule = 512;  // bytes; sizes are rounded up to it, as CUDA's allocator of torch does
constexpr int64_t kTotal = int64_t(24) << 30;

// ---- memory ---------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated{0}, peak{0}, limit{kTotal};

size_t rounded(size_t bytes) { return (bytes + kGranule - 1) / kGranule * kGranule; }

void* unwritten(size_t bytes) {
  void* data = std::aligned_alloc(kGranule, bytes);
  TORCH_CHECK(data != nullptr, "the simulated card has no main memory left for ", bytes, " bytes");
  std::memset(data, 0xFF, bytes);  // NaN in every floating-point type
  return data;
}

struct Block {
  void* data;
  size_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= static_cast<int64_t>(block->bytes);
  std::free(block->data);
  delete block;
}

void nothing(void*) {}

struct CardAllocator final : c10::Allocator {
  DataPtr allocate(size_t wanted) override {
    if (wanted == 0) return {nullptr, nullptr, &nothing, kCard};
    const auto bytes = rounded(wanted);
    const auto used = allocated.load();
    if (used + static_cast<int64_t>(bytes) > limit)
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes; ", used,
                       " of ", limit.load(), " are in use (simulated card)");
    void* data = unwritten(bytes);
    const int64_t now = (allocated += static_cast<int64_t>(bytes));
    if (now > peak) peak = now;
    return {data, new Block{data, bytes}, &free_block, kCard};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
CardAllocator card_allocator;

// ---- pinned memory --------------------------------------------------------------------------------------------------

std::mutex pins_lock;
std::map<const char*, size_t> allocated_pins, registered_pins;  // address -> bytes

bool within(const std::map<const char*, size_t>& ranges, const void* address) {
  auto next = ranges.upper_bound(static_cast<const char*>(address));
  if (next == ranges.begin()) return false;
  --next;
  return static_cast<const char*>(address) < next->first + next->second;
}

bool is_registered(const void* address) {
  std::lock_guard<std::mutex> guard(pins_lock);
  return within(registered_pins, address);
}

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> guard(pins_lock);
  return within(allocated_pins, address) || within(registered_pins, address);
}

void free_pinned(void* data) {
  std::lock_guard<std::mutex> guard(pins_lock);
  allocated_pins.erase(static_cast<char*>(data));
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  DataPtr allocate(size_t wanted) override {
    if (wanted == 0) return {nullptr, nullptr, &nothing, Device(DeviceType::CPU)};
    const auto bytes = rounded(wanted);
    void* data = unwritten(bytes);
    std::lock_guard<std::mutex> guard(pins_lock);
    allocated_pins[static_cast<char*>(data)] = bytes;
    return {data, data, &free_pinned, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

// ---- generators -----------------------------------------------------------------------------------------------------

// A generator of the card: one of the CPU inside, since the CPU's kernels draw.
struct CardGenerator final : c10::GeneratorImpl {
  explicit CardGenerator(Generator inner)
      : c10::GeneratorImpl(kCard, DispatchKeySet(DispatchKey::CUDA)), inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "generators of the simulated card have no offset"); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator inner;

 private:
  CardGenerator* clone_impl() const override { return new CardGenerator(inner.clone()); }
};

Generator new_generator() { return make_generator<CardGenerator>(at::detail::createCPUGenerator()); }

Generator& default_generator() {
  static Generator generator = new_generator();
  return generator;
}

Generator inner_of(const Generator& generator) {
  return static_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// Swaps what two generators of the CPU will draw.
void swap_engines(const Generator& one, const Generator& other) {
  auto* a = check_generator<CPUGeneratorImpl>(one);
  auto* b = check_generator<CPUGeneratorImpl>(other);
  const auto engine = a->engine();
  const auto single = a->next_float_normal_sample();
  const auto wide = a->next_double_normal_sample();
  a->set_engine(b->engine());
  a->set_next_float_normal_sample(b->next_float_normal_sample());
  a->set_next_double_normal_sample(b->next_double_normal_sample());
  b->set_engine(engine);
  b->set_next_float_normal_sample(single);
  b->set_next_double_normal_sample(wide);
}

// While it lives, the CPU's default generator draws what the card's would: for operators like dropout.
struct DrawFromCard {
  explicit DrawFromCard(bool wanted) : wanted(wanted) { exchange(); }
  ~DrawFromCard() { exchange(); }
  void exchange() const {
    if (!wanted) return;
    Generator cpu = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> guard(cpu.mutex());
    swap_engines(cpu, inner_of(default_generator()));
  }
  const bool wanted;
};

// ---- waits ----------------------------------------------------------------------------------------------------------

std::atomic<int64_t> waits{0};
std::atomic<int> sync_mode{0};  // of torch.cuda.set_sync_debug_mode: 0 nothing, 1 warn, 2 raise

void host_waits() {
  ++waits;
  TORCH_CHECK(sync_mode != 2, "called a synchronizing CUDA operation");
  if (sync_mode == 1) TORCH_WARN("called a synchronizing CUDA operation");
}

// ---- hooks ----------------------------------------------------------------------------------------------------------

// One device, and one stream as far as autograd knows: streams are simulated in Python (streams.py).
struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kCard; }
  Device getDevice() const override { return kCard; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kCard); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kCard); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, kCard); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
}  // namespace simulated

namespace at {  // torch looks for a class of this name
// Some are not virtual in every version of torch, hence no `override`.
struct CUDAHooks final : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const {}
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCUDA() const { return true; }
  bool hasCUDART() const { return true; }
  bool hasPrimaryContext(DeviceIndex) const { return true; }
  DeviceIndex current_device() const { return 0; }
  DeviceIndex deviceCount() const { return 1; }
  int getNumGPUs() const { return 1; }
  DeviceIndex getCurrentDevice() const { return 0; }
  void setCurrentDevice(DeviceIndex) const {}
  DeviceIndex exchangeDevice(DeviceIndex) const { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const { return 0; }
  bool isPinnedPtr(const void* address) const { return simulated::is_pinned(address); }
  Allocator* getPinnedMemoryAllocator() const { return &simulated::pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const { return &simulated::card_allocator; }
  Device getDeviceFromPtr(void*) const { return simulated::kCard; }
  void deviceSynchronize(DeviceIndex) const { ++simulated::waits; }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const { return simulated::default_generator(); }
  Generator getNewGenerator(DeviceIndex = -1) const { return simulated::new_generator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace simulated {
// ---- fallback -------------------------------------------------------------------------------------------------------

// The bytes of a tensor of the card as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  auto options = t.options().device(kCPU).requires_grad(false).pinned_memory(false);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  const auto* base = static_cast<const char*>(t.storage().data());
  auto* data = const_cast<char*>(base) + t.storage_offset() * static_cast<int64_t>(t.element_size());
  auto lent = at::for_blob(data, t.sizes())
                  .strides(t.strides())
                  .deleter([keep = t.storage()](void*) {})
                  .options(options)
                  .target_device(Device(kCPU))
                  .resizeable_storage()
                  .allocator(c10::GetAllocator(DeviceType::CPU))
                  .make_tensor();
  if (t.is_conj()) lent._set_conj(true);
  if (t.is_neg()) lent._set_neg(true);
  return lent;
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &card_allocator, DispatchKeySet(DispatchKey::CUDA), dtype);
}

// A tensor of the card in `storage`, otherwise like a tensor of the CPU.
Tensor view_like(const Tensor& cpu, Storage storage, int64_t offset) {
  auto t = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CUDA), cpu.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), offset);
  if (cpu.is_conj()) t._set_conj(true);
  if (cpu.is_neg()) t._set_neg(true);
  return t;
}

// A new tensor of the card with the values of a tensor of the CPU.
Tensor on_card(const Tensor& cpu) {
  auto t = empty_strided(cpu.sizes(), cpu.strides(), cpu.scalar_type());
  if (cpu.is_conj()) t._set_conj(true);
  if (cpu.is_neg()) t._set_neg(true);
  if (cpu.numel()) on_cpu(t).copy_(cpu);
  return t;
}

bool is_one_of(const std::string& name, const std::set<std::string>& names) { return names.count(name) > 0; }

bool takes_indices(const std::string& name) {
  return is_one_of(name, {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"});
}

// Results whose size depends on values: the host reads them.
bool reads_values(const std::string& name) {
  return is_one_of(name, {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique", "aten::_unique2",
                          "aten::unique_consecutive", "aten::unique_dim", "aten::bincount", "aten::repeat_interleave",
                          "aten::_local_scalar_dense", "aten::nonzero_static"});
}

// One call of an operator: its arguments lent to the CPU, and its results taken back.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const auto begin = stack_.size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) lend(stack_[begin + i], arguments[i]);
    check();
    {
      const bool draws = op_.hasTag(at::Tag::nondeterministic_seeded) && !has_generator_;
      DrawFromCard default_draws(draws);
      c10::impl::ExcludeDispatchKeyGuard not_here(c10::DispatchKeySet(c10::BackendComponent::CUDABit));
      op_.callBoxed(&stack_);
    }
    for (auto i = stack_.size() - op_.schema().returns().size(); i < stack_.size(); ++i) take_back(stack_[i]);
  }

 private:
  void lend(IValue& value, const c10::Argument& argument) {
    written_ = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      value = lend(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> lent;
      for (const Tensor& t : value.toTensorList()) lent.push_back(lend(t));
      value = lent;
    } else if (is_list_of_lists(value)) {
      c10::List<c10::List<Tensor>> lists;
      for (const IValue& inner : value.toListRef()) {
        c10::List<Tensor> lent;
        for (const Tensor& t : inner.toTensorVector()) lent.push_back(lend(t));
        lists.push_back(lent);
      }
      value = lists;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> lent;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList())
        lent.push_back(t.has_value() ? std::optional<Tensor>(lend(*t)) : t);
      value = lent;
    } else if (value.isGenerator()) {
      lend_generator(value);
    } else if (value.isDevice()) {
      makes_card_ |= value.toDevice().is_cuda();
      value = Device(kCPU);
    } else if (argument.name() == "pin_memory") {
      value = IValue();
    }
  }

  static bool is_list_of_lists(const IValue& value) {
    return value.isList() && !value.isTensorList() && value.toListRef().size() > 0 && value.toListRef()[0].isTensorList();
  }

  Tensor lend(const Tensor& t) {
    if (!t.defined()) return t;
    if (t.is_cuda()) {
      boolean_ |= t.scalar_type() == kBool && !cards_.empty() && !written_;
      cards_.push_back(t);
      lent_.push_back(on_cpu(t));
      return lent_.back();
    }
    if (t.is_cpu()) {
      host_is_first_ |= cards_.empty() && hosts_.empty();
      host_is_written_ |= written_;
      if (t.dim() > 0) hosts_.push_back(t);
    }
    return t;
  }

  void lend_generator(IValue& value) {
    auto generator = value.toGenerator();
    if (!generator.defined()) return;
    has_generator_ = true;
    generator_ = generator.device();
    if (generator_->is_cuda()) value = inner_of(generator);
  }

  // Raises what a card would raise.
  void check() const {
    const auto& name = op_.schema().name();
    const bool here = !cards_.empty() || makes_card_;
    TORCH_CHECK(!has_generator_ || generator_->is_cuda() == here, "Expected a '", here ? "cuda" : "cpu",
                "' device type for generator but found '", generator_->type(), "' (in ", name, ")");
    if (cards_.empty()) return;
    const bool indices = takes_indices(name);
    const bool mixed = !hosts_.empty() && !(indices && !host_is_first_) && name != "aten::_foreach_copy_";
    TORCH_CHECK(!mixed && !host_is_written_,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in ",
                name, hosts_.empty() ? "" : ", a tensor of the CPU has the size ",
                hosts_.empty() ? IntArrayRef() : hosts_[0].sizes(), ")");
    if (reads_values(name) || (indices && (boolean_ || !hosts_.empty()))) host_waits();
  }

  void take_back(IValue& value) const {
    if (value.isTensor()) {
      value = take_back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> taken;
      for (const Tensor& t : value.toTensorList()) taken.push_back(take_back(t));
      value = taken;
    }
  }

  Tensor take_back(const Tensor& t) const {
    if (!t.defined() || !t.is_cpu() || (cards_.empty() && !makes_card_)) return t;
    for (size_t k = 0; k < lent_.size(); ++k)
      if (t.is_same(lent_[k])) return same(cards_[k], t);
    for (size_t k = 0; k < lent_.size(); ++k)
      if (t.numel() && t.storage().is_alias_of(lent_[k].storage())) {
        const auto* base = static_cast<const char*>(cards_[k].storage().data());
        const auto distance = static_cast<const char*>(t.const_data_ptr()) - base;
        return view_like(t, cards_[k].storage(), distance / static_cast<int64_t>(t.element_size()));
      }
    return on_card(t);
  }

  // An argument that is a result, too; the CPU may have given it another size (out=).
  static Tensor same(const Tensor& card, const Tensor& t) {
    if (card.sizes().equals(t.sizes()) && (t.numel() == 0 || t.const_data_ptr() == on_cpu(card).const_data_ptr()))
      return card;
    auto grown = on_card(t);
    auto* impl = card.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(grown.storage());
    impl->set_sizes_and_strides(grown.sizes(), grown.strides(), 0);
    return card;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::vector<Tensor> cards_, lent_, hosts_;  // hosts: tensors of the CPU that are more than a number
  std::optional<Device> generator_;
  bool has_generator_ = false, makes_card_ = false, written_ = false, boolean_ = false;
  bool host_is_first_ = false, host_is_written_ = false;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, *stack).run(); }

// ---- kernels --------------------------------------------------------------------------------------------------------

using Ints = c10::SymIntArrayRef;

Tensor empty(Ints size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &card_allocator, DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided_op(Ints size, Ints stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                        std::optional<Device>, std::optional<bool>) {
  return empty_strided(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, Ints size, Ints stride, std::optional<c10::SymInt> offset) {
  const auto start = offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, Ints size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, Ints size, Ints stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_same(source) || self.numel() == 0) return self;
  const auto* host = self.is_cpu() ? &self : source.is_cpu() ? &source : nullptr;
  if (host != nullptr && !(non_blocking && (host->is_same(source) || is_pinned(host->const_data_ptr())))) host_waits();
  auto to = self.is_cuda() ? on_cpu(self) : self, from = source.is_cuda() ? on_cpu(source) : source;
  TORCH_CHECK(to.is_cpu() && from.is_cpu(), "copy_ between ", source.device(), " and ", self.device());
  to.copy_(from);
  return self;
}

Tensor& set_storage(Tensor& self, Storage source, c10::SymInt offset, Ints size, Ints stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  if (size.size() > 0 && stride.size() == size.size())
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  else
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  return self;
}

Tensor& set_whole_storage(Tensor& self, Storage source) {
  const c10::SymInt count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {count}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  TORCH_CHECK(source.is_cuda(), "set_: a tensor of the card cannot take the storage of a tensor on ", source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

Scalar local_scalar_dense(const Tensor& self) {
  host_waits();
  return on_cpu(self).item();
}

// The CPU's softmax does not widen, as a card's does.
Tensor softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  auto x = on_cpu(self);
  return on_card(at::_softmax(half_to_float ? x.to(kFloat) : x, dim, false));
}

Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, ScalarType input_dtype) {
  return on_card(at::_softmax_backward_data(on_cpu(grad), on_cpu(output), dim, output.scalar_type()).to(input_dtype));
}

// Depthwise convolutions: torch takes kernels on a card that a CPU has none of.
Tensor conv_depthwise(const Tensor& self, const Tensor& weight, IntArrayRef, const std::optional<Tensor>& bias,
                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  const auto own_bias = bias.has_value() && bias->defined() ? on_cpu(*bias) : Tensor();
  return on_card(at::conv2d(on_cpu(self), on_cpu(weight), own_bias, stride, padding, dilation, self.size(1)));
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                 OptionalIntArrayRef bias_sizes, IntArrayRef stride,
                                                 IntArrayRef padding, IntArrayRef dilation, bool transposed,
                                                 IntArrayRef output_padding, int64_t groups,
                                                 std::array<bool, 3> mask) {
  if (groups == 1 || groups != input.size(1))
    return at::native::convolution_backward(grad, input, weight, bias_sizes, stride, padding, dilation, transposed,
                                            output_padding, groups, mask);
  auto [x, w, b] = at::convolution_backward(on_cpu(grad), on_cpu(input), on_cpu(weight), bias_sizes, stride, padding,
                                            dilation, transposed, output_padding, groups, mask);
  const auto taken = [](const Tensor& t) { return t.defined() ? on_card(t) : t; };
  return {taken(x), taken(w), taken(b)};
}

int64_t fused_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // the formula itself
}

const Tensor& resize(const Tensor& self, Ints size, std::optional<MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes().equals(sizes)) return self;
  auto* impl = self.unsafeGetTensorImpl();
  const auto bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(self.element_size());
  const auto start = self.storage_offset() * static_cast<int64_t>(self.element_size());
  const auto present = self.storage().nbytes();
  if (start + bytes > static_cast<int64_t>(present)) {
    Storage grown(Storage::use_byte_size_t(), start + bytes, card_allocator.allocate(start + bytes), &card_allocator, true);
    if (present) std::memcpy(grown.mutable_data(), self.storage().data(), present);
    impl->set_storage_keep_dtype(std::move(grown));
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

void record_stream(Tensor&, Stream) {}  // what it is for is in races.py

void set_default_generator(std::optional<Generator> generator) { default_generator() = generator.value(); }
}  // namespace simulated

C10_REGISTER_GUARD_IMPL(CUDA, simulated::CardGuard);
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &simulated::empty);
  m.impl("empty_strided", &simulated::empty_strided_op);
  m.impl("as_strided", &simulated::as_strided);
  m.impl("view", &simulated::view);
  m.impl("_reshape_alias", &simulated::reshape_alias);
  m.impl("copy_", &simulated::copy);
  m.impl("set_.source_Storage", &simulated::set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &simulated::set_storage);
  m.impl("set_.source_Tensor", &simulated::set_tensor);
  m.impl("_local_scalar_dense", &simulated::local_scalar_dense);
  m.impl("_softmax", &simulated::softmax);
  m.impl("_softmax_backward_data", &simulated::softmax_backward);
  m.impl("_conv_depthwise2d", &simulated::conv_depthwise);
  m.impl("convolution_backward", &simulated::conv_backward);
  m.impl("_fused_sdp_choice", &simulated::fused_sdp_choice);
  m.impl("resize_", &simulated::resize);
  m.impl("record_stream", &simulated::record_stream);
}

// ---- processes ------------------------------------------------------------------------------------------------------

namespace {
struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Gloo knows of no card: processes exchange its bytes as tensors of the CPU. Torch warns of kernels that are replaced.
const bool exchanges = [] {
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard quiet(&silent);
  static torch::Library library(torch::Library::IMPL, "c10d", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (const char* name : {"allreduce_", "broadcast_", "allgather_", "_allgather_base_", "reduce_", "gather_",
                           "scatter_", "barrier", "send", "recv_"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>());
  return true;
}();
}  // namespace

namespace c10d {
// DDP times its passes with one of the device.
struct CardTimer final : Timer {
  explicit CardTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimeRef(start), to = getTimeRef(end);
    return from < 0 || to < 0 ? std::nullopt : std::optional<int64_t>(to - from);
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, CardTimer)
}  // namespace c10d

// ---- interface ------------------------------------------------------------------------------------------------------

TORCH_LIBRARY(simulated_card, m) {
  m.def("set_default_generator(Generator? generator) -> ()",
        torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, &simulated::set_default_generator));
}

namespace {
const bool ready = (c10::SetAllocator(c10::DeviceType::CUDA, &simulated::card_allocator), true);
}

extern "C" {
int64_t card_total() { return simulated::kTotal; }
int64_t card_allocated() { return simulated::allocated; }
int64_t card_peak() { return simulated::peak; }
void card_reset_peak() { simulated::peak = simulated::allocated.load(); }
void card_set_limit(int64_t bytes) { simulated::limit = bytes; }
int64_t card_limit() { return simulated::limit; }
int64_t card_waits() { return simulated::waits; }
void card_host_waits() { ++simulated::waits; }
void card_set_sync_mode(int mode) { simulated::sync_mode = mode; }
int card_sync_mode() { return simulated::sync_mode; }
bool card_is_registered(const void* address) { return simulated::is_registered(address); }
bool card_is_pinned(const void* address) { return simulated::is_pinned(address); }

// false: part of it is pinned already
bool card_register(const char* address, size_t bytes) {
  if (simulated::is_pinned(address) || (bytes && simulated::is_pinned(address + bytes - 1))) return false;
  std::lock_guard<std::mutex> guard(simulated::pins_lock);
  simulated::registered_pins[address] = bytes;
  return true;
}

// false: nothing is registered there
bool card_unregister(const char* address) {
  std::lock_guard<std::mutex> guard(simulated::pins_lock);
  return simulated::registered_pins.erase(address) > 0;
}
}
