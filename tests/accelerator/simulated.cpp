// A simulated accelerator for torch: tensors of the device "sim" lie in plain host memory, and every operator runs on the CPU
// on that memory. What a real device is strict about, this one is strict about too:
//  - an operator that mixes a CPU tensor of one dimension or more with a device tensor is refused, as CUDA does;
//  - a copy from the device with non_blocking=True is late: the host reads NaN (or -1) there until somebody waits
//    (synchronize, .item(), a blocking copy). CUDA does so into pinned memory alone, MPS and XPU into any;
//  - a copy from pinned memory with non_blocking=True may be late too: who changes that memory before somebody waits is
//    told so by an error there;
//  - it may have no float64, as MPS and some of XPU's;
//  - memory is counted, its peak kept, and a limit raises OutOfMemoryError.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

namespace sim {

using at::Tensor;
using at::Scalar;
using at::ScalarType;
using c10::Device;
using c10::IntArrayRef;
using c10::Layout;
using c10::MemoryFormat;
using c10::Storage;
using c10::SymInt;
using c10::SymIntArrayRef;
using c10::TensorImpl;

constexpr auto SIM = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// ---- memory ---------------------------------------------------------------------------------------------------------

std::atomic<int64_t> live{0}, peak{0}, limit{int64_t(24) << 30}, delayed{0};
struct Block { void* data; size_t bytes; };

void* take(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes ? bytes : 64)) throw std::bad_alloc();
  return data;
}

void free_device(void* context) { auto* block = static_cast<Block*>(context); live -= block->bytes; free(block->data); delete block; }

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    live += bytes;
    if (live > limit) { live -= bytes; TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory. Tried to allocate ", bytes, " bytes."); }
    if (live > peak) peak = live.load();
    void* data = take(bytes);
    return {data, new Block{data, bytes}, &free_device, c10::Device(SIM, 0)};
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& all = stats.allocated_bytes[0];
    all.current = live; all.peak = peak;
    stats.reserved_bytes[0].current = live;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = live.load(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {size_t(limit - live), size_t(limit)}; }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
DeviceAllocator device_memory;

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;

void free_pinned(void* context) {
  auto* block = static_cast<Block*>(context);
  { std::lock_guard<std::mutex> lock(pinned_mutex); pinned.erase(reinterpret_cast<uintptr_t>(block->data)); }
  free(block->data); delete block;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = take(bytes);
    { std::lock_guard<std::mutex> lock(pinned_mutex); pinned[reinterpret_cast<uintptr_t>(data)] = bytes; }
    return {data, new Block{data, bytes}, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedAllocator pinned_memory;

bool is_pinned(const void* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto next = pinned.upper_bound(address);
  if (next == pinned.begin()) return false;
  --next;
  return address < next->first + next->second;
}

// ---- copies that come late ------------------------------------------------------------------------------------------

struct Late { Tensor from, to; };      // device → host: ``to`` is not yet written
struct Read { Tensor host, before; };  // host → device: ``host`` may still be read
std::mutex late_mutex;
std::vector<Late> late;
std::vector<Read> reads;

void write(bool arrived) {
  for (auto& copy : late) {
    if (arrived) copy.to.copy_(copy.from);
    else if (copy.to.is_floating_point()) copy.to.fill_(std::numeric_limits<double>::quiet_NaN());
    else copy.to.fill_(-1);
  }
}

void check_reads() {  // of bytes, so that NaN equals NaN
  write(true);  // what older copies bring is no change
  std::vector<Read> now;
  now.swap(reads);
  for (auto& read : now)
    TORCH_CHECK(read.host.contiguous().view(at::kByte).equal(read.before.contiguous().view(at::kByte)),
                "host memory was changed while a copy from it was under way");
}

void wait_for_copies() {
  std::lock_guard<std::mutex> lock(late_mutex);
  check_reads();
  late.clear();
}

// ---- what torch asks a device ---------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Device here() const { return {SIM, 0}; }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::DeviceType type() const override { return SIM; }
  c10::Device exchangeDevice(c10::Device) const override { return here(); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait_for_copies(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { wait_for_copies(); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  Device getDeviceFromPtr(void*) const override { return Device(SIM, 0); }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { static auto one = at::detail::createCPUGenerator(); return one; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = device_memory.allocate(bytes);
    if (storage.nbytes()) memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

// ---- tensors of both kinds over the same memory ---------------------------------------------------------------------

bool is_sim(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == SIM; }

Tensor host_view(const Tensor& tensor) {
  auto storage = tensor.storage();
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true);
  auto view = at::detail::make_tensor<TensorImpl>(std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return view;
}

Tensor device_view(const Tensor& base, const Tensor& like) {
  auto view = at::detail::make_tensor<TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return view;
}

ScalarType or_default(std::optional<ScalarType> dtype) { return dtype.value_or(c10::get_default_dtype_as_scalartype()); }

std::atomic<bool> has_double{true};

ScalarType allowed(ScalarType dtype) {
  TORCH_CHECK_TYPE(has_double || dtype != ScalarType::Double, "Cannot convert to float64: the device does not support it.");
  return dtype;
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, KEYS, allowed(or_default(dtype)));
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, KEYS, allowed(or_default(dtype)), format);
}

Tensor to_device(const Tensor& host) {
  auto result = empty_strided(host.sizes(), host.strides(), host.scalar_type(), {}, {}, {});
  host_view(result).copy_(host);
  return result;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  if (is_sim(self) && is_sim(to)) { host_view(to).copy_(host_view(self)); return to; }
  if (!non_blocking) wait_for_copies();
  std::lock_guard<std::mutex> lock(late_mutex);
  if (is_sim(self)) {
    if (!non_blocking) { Tensor target = to; target.copy_(host_view(self)); return to; }
    check_reads();  // in the order of the stream, they are over when this one begins
    late.push_back({host_view(self).clone(), to});
    delayed++;
    write(false);
    return to;
  }
  write(true);  // what is late is there in the order of the stream, though not yet for the host
  host_view(to).copy_(self);
  if (non_blocking && self.numel() && is_pinned(self.data_ptr())) reads.push_back({self, self.clone()});
  write(false);
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) { Tensor target = to; target.resize_(self.sizes()); return copy_from(self, target, false); }
Scalar local_scalar(const Tensor& tensor) { wait_for_copies(); return host_view(tensor).item(); }

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  auto view = at::detail::make_tensor<TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset ? offset->expect_int() : self.storage_offset());
  return view;
}
Tensor view(const Tensor& self, SymIntArrayRef size) { return device_view(self, host_view(self).view(C10_AS_INTARRAYREF_SLOW(size))); }
Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) { return self.as_strided_symint(size, stride); }
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) { return device_view(self, host_view(self).unfold(dim, size, step)); }

const Tensor& resize(const Tensor& self, SymIntArrayRef size, std::optional<MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  int64_t count = 1;
  for (auto one : sizes) count *= one;
  size_t bytes = (count + self.storage_offset()) * self.itemsize();
  if (self.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}
Tensor& set_storage(Tensor& self, Storage source) {
  auto* tensor = self.unsafeGetTensorImpl();
  int64_t count = source.nbytes() / self.itemsize();
  tensor->set_storage_keep_dtype(source); tensor->set_storage_offset(0); tensor->set_sizes_contiguous({count});
  return self;
}
Tensor& set_storage_offset(Tensor& self, Storage source, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(source);
  tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

// ---- every other operator -------------------------------------------------------------------------------------------

bool may_mix(const std::string& name) { return name.find("aten::index") == 0 || name.find("aten::_index_put") == 0; }  // CUDA takes indices on the host

void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const size_t count = arguments.size(), first = stack->size() - count;
  std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  bool device = false, host = false;
  auto look = [&](const Tensor& t) { if (!t.defined()) return; if (is_sim(t)) device = true; else if (t.device().is_cpu() && t.dim() > 0) host = true; };
  for (auto& value : given) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const auto& t : value.toTensorVector()) look(t);
    else if (value.isOptionalTensorList()) for (const auto& t : value.toOptionalTensorVector()) if (t) look(*t);
  }
  TORCH_CHECK(!(device && host && !may_mix(schema.name())), "Expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu! (", schema.name(), ")");
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) { auto t = value.toTensor(); if (is_sim(t)) value = host_view(t); }
    else if (value.isTensorList()) { c10::List<Tensor> list; for (const auto& t : value.toTensorVector()) list.push_back(is_sim(t) ? host_view(t) : t); value = list; }
    else if (value.isOptionalTensorList()) { c10::List<std::optional<Tensor>> list; for (const auto& t : value.toOptionalTensorVector()) list.push_back(t && is_sim(*t) ? std::optional<Tensor>(host_view(*t)) : t); value = list; }
    else if (value.isDevice() && value.toDevice().type() == SIM) { device = true; value = c10::Device(c10::kCPU); }
  }
  std::vector<c10::IValue> passed(stack->begin() + first, stack->end());
  { at::AutoDispatchBelowADInplaceOrView guard; op.callBoxed(stack); }
  const size_t results = schema.returns().size(), last = stack->size() - results;
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[last + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {  // in place and out=: the caller's own tensor
      for (size_t a = 0; a < count; ++a) {
        const auto* other = arguments[a].alias_info();
        if (!(other && other->isWrite() && other->afterSets() == alias->afterSets())) continue;
        if (given[a].isTensor() && is_sim(given[a].toTensor())) {
          auto result = passed[a].toTensor(), own = given[a].toTensor();
          if (result.sizes() != own.sizes()) { own.resize_(result.sizes()); host_view(own).copy_(result); }
          value = given[a];
        }
        break;
      }
    } else if (device && value.isTensor() && value.toTensor().defined()) {
      auto result = value.toTensor();
      bool is_view = false;
      if (alias) for (size_t a = 0; a < count && !is_view; ++a)
        if (given[a].isTensor() && is_sim(given[a].toTensor()) && result.storage().data() == passed[a].toTensor().storage().data()) { value = device_view(given[a].toTensor(), result); is_view = true; }
      if (!is_view) value = to_device(result);
    } else if (device && value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(to_device(t));
      value = list;
    }
  }
}

}  // namespace sim

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&sim::on_the_host>()); }
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // what a decoder has of the CPU's list
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(sim::empty));
  m.impl("empty_strided", TORCH_FN(sim::empty_strided));
  m.impl("as_strided", TORCH_FN(sim::as_strided));
  m.impl("view", TORCH_FN(sim::view));
  m.impl("_reshape_alias", TORCH_FN(sim::reshape_alias));
  m.impl("unfold", TORCH_FN(sim::unfold));
  m.impl("resize_", TORCH_FN(sim::resize));
  m.impl("_copy_from", TORCH_FN(sim::copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(sim::copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(sim::local_scalar));
  m.impl("set_.source_Storage", TORCH_FN(sim::set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(sim::set_storage_offset));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(sim::SIM, &sim::device_memory);
  at::RegisterPrivateUse1HooksInterface(new sim::Hooks());
  m.def("synchronize", [] { sim::wait_for_copies(); });
  m.def("delayed_copies", [] { return sim::delayed.load(); });
  m.def("set_has_double", [](bool has) { sim::has_double = has; });
  m.def("set_limit", [](int64_t bytes) { sim::limit = bytes; });
}
