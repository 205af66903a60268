// A CUDA device without a GPU, for a CPU build of PyTorch.
//
// A tensor "on cuda:0" has storage of its own, in the host's memory. An operation on such tensors reaches `fallback`,
// which checks what a GPU would check, reports what a GPU would be asked (waits, copies, launches), runs PyTorch's CPU
// kernel on aliases of the same memory and gives its results back as tensors of the device. All above the backend
// (autograd, views, version counters, threads of the backward pass) is PyTorch's own.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;

// -- state ------------------------------------------------------------------------------------------------------------

int device_count = 1;
thread_local c10::DeviceIndex current_device = 0;

Device device_now() { return Device(DeviceType::CUDA, current_device); }

c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
  const c10::DeviceIndex before = current_device;
  if (index >= 0) current_device = index;
  return before;
}

// -- memory -----------------------------------------------------------------------------------------------------------

// PyTorch's caching allocator hands out multiples of this, so that peaks are as on a GPU but for fragmentation.
constexpr size_t kGranule = 512;

size_t round_up(size_t bytes) { return (bytes + kGranule - 1) / kGranule * kGranule; }

// Live memory of one kind, by address.
class Blocks {
 public:
  void add(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[reinterpret_cast<uintptr_t>(data)] = bytes;
    allocated_ += round_up(bytes);
    peak_ = std::max(peak_, allocated_);
  }

  void remove(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(reinterpret_cast<uintptr_t>(data));
    if (found == blocks_.end()) return;
    allocated_ -= round_up(found->second);
    blocks_.erase(found);
  }

  bool contains(const void* data) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto address = reinterpret_cast<uintptr_t>(data);
    auto next = blocks_.upper_bound(address);
    if (next == blocks_.begin()) return false;
    --next;
    return address < next->first + next->second;
  }

  std::vector<std::pair<uintptr_t, size_t>> list() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return {blocks_.begin(), blocks_.end()};
  }

  size_t allocated() const { return allocated_; }
  size_t peak() const { return peak_; }
  void reset_peak() { peak_ = allocated_; }

 private:
  mutable std::mutex mutex_;
  std::map<uintptr_t, size_t> blocks_;
  size_t allocated_ = 0, peak_ = 0;
};

// Never destroyed: tensors are freed after static objects are.
Blocks& device_blocks = *new Blocks;
Blocks& pinned_blocks = *new Blocks;

// Memory of CUDA graphs that share a pool. It stays theirs: what is freed serves later allocations of its size while
// one of them is captured, as PyTorch's allocator has it, and replays write there again.
class Pool {
 public:
  void* take(size_t bytes) {
    const auto found = free_.find(round_up(bytes));
    if (found == free_.end()) return nullptr;
    void* data = found->second;
    free_.erase(found);
    return data;
  }

  void own(void* data, size_t bytes) { sizes_[data] = round_up(bytes); }

  bool give_back(void* data) {
    const auto found = sizes_.find(data);
    if (found == sizes_.end()) return false;
    free_.emplace(found->second, data);
    return true;
  }

 private:
  std::unordered_map<void*, size_t> sizes_;
  std::multimap<size_t, void*> free_;
};

// What a CUDA graph does when it is replayed, in order.
struct Graph {
  size_t pool;
  std::vector<std::function<void()>> steps;
};

// By number, and never destroyed.
std::mutex& graph_mutex = *new std::mutex;
std::map<size_t, Pool>& pools = *new std::map<size_t, Pool>;
std::map<size_t, Graph>& graphs = *new std::map<size_t, Graph>;
std::atomic<Graph*> captured{nullptr};

bool kept_by_a_graph(void* data) {
  std::lock_guard<std::mutex> lock(graph_mutex);
  for (auto& [number, pool] : pools)
    if (pool.give_back(data)) return true;
  return false;
}

void refuse_in_capture(const std::string& what) {
  TORCH_CHECK(!captured, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

void free_block(Blocks& blocks, void* data) {
  if (!data || kept_by_a_graph(data)) return;
  blocks.remove(data);
  std::free(data);
}
void free_device(void* data) { free_block(device_blocks, data); }
void free_pinned(void* data) { free_block(pinned_blocks, data); }

class StandInAllocator final : public c10::Allocator {
 public:
  StandInAllocator(Blocks& blocks, c10::DeleterFnPtr deleter, bool pinned)
      : blocks_(blocks), deleter_(deleter), pinned_(pinned) {}

  c10::DataPtr allocate(size_t bytes) override {
    const Device device = pinned_ ? Device(DeviceType::CPU) : device_now();
    if (!bytes) return {nullptr, nullptr, deleter_, device};
    const bool pooled = captured && !pinned_;
    void* data = pooled ? from_pool(bytes) : nullptr;
    if (!data) {
      TORCH_CHECK(posix_memalign(&data, kGranule, round_up(bytes)) == 0, "CUDA out of memory (stand-in)");
      blocks_.add(data, pooled ? round_up(bytes) : bytes);  // it may serve others later
      if (pooled) to_pool(data, bytes);
    }
    // NaN in every floating dtype and -1 in integers, so that what nobody has written shows.
    std::memset(data, 0xFF, round_up(bytes));
    return {data, data, deleter_, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return deleter_; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void* from_pool(size_t bytes) {
    std::lock_guard<std::mutex> lock(graph_mutex);
    return pools[captured.load()->pool].take(bytes);
  }
  static void to_pool(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(graph_mutex);
    pools[captured.load()->pool].own(data, bytes);
  }

  Blocks& blocks_;
  c10::DeleterFnPtr deleter_;
  bool pinned_;
};

StandInAllocator& device_allocator = *new StandInAllocator(device_blocks, &free_device, false);
StandInAllocator& pinned_allocator = *new StandInAllocator(pinned_blocks, &free_pinned, true);

// -- what PyTorch asks a device backend -------------------------------------------------------------------------------

// One stream, always idle: everything has happened when a call returns.
struct StandInGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device to) const override { return Device(DeviceType::CUDA, exchange_device(to.index())); }
  Device getDevice() const override { return device_now(); }
  void setDevice(Device to) const override { exchange_device(to.index()); }
  void uncheckedSetDevice(Device to) const noexcept override { exchange_device(to.index()); }
  c10::Stream getStream(Device on) const override {
    return c10::Stream(c10::Stream::DEFAULT, on.index() < 0 ? device_now() : on);
  }
  c10::Stream getDefaultStream(Device on) const override { return getStream(on); }
  c10::Stream getStreamFromGlobalPool(Device on, bool) const override { return getStream(on); }
  c10::Stream getNewStream(Device on, int) const override { return getStream(on); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);  // anything that is not null: recorded
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};

struct StandInHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  long versionCuDNN() const override { return 91300; }
  long versionRuntimeCuDNN() const override { return 91300; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count); }
  int getNumGPUs() const override { return device_count; }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchange_device(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return exchange_device(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchange_device(index); }
  bool isPinnedPtr(const void* data) const override { return pinned_blocks.contains(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void*) const override { return device_now(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

// PyTorch keeps the hooks that it found when it first asked, before this library was loaded: the table of virtual
// functions of that object becomes ours. Neither class has data members.
void take_over_hooks() {
  static StandInHooks ours;
  auto& kept = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  if (!kept.hasCUDA()) *reinterpret_cast<void**>(&kept) = *reinterpret_cast<void**>(&ours);
}

// -- aliases ----------------------------------------------------------------------------------------------------------

Tensor like(c10::Storage storage, DispatchKey key, const Tensor& shape) {
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), shape.dtype());
  out.unsafeGetTensorImpl()->set_storage_offset(shape.storage_offset());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides());
  return out;
}

// A tensor of the host over the memory of one of the device, which it keeps alive.
Tensor host_alias(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const c10::Storage& storage = tensor.storage();
  const auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  c10::DataPtr data(
      const_cast<void*>(storage.data()), new c10::Storage(storage), release, Device(DeviceType::CPU));
  c10::Storage other(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  return like(std::move(other), DispatchKey::CPU, tensor);
}

// A fresh result of a CPU kernel as a tensor of the device, in memory of the device's allocator, which counts it.
Tensor to_device(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  const size_t bytes = tensor.storage().nbytes();
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), bytes, device_allocator.allocate(bytes), &device_allocator, true);
  if (bytes) std::memcpy(const_cast<void*>(storage.data()), tensor.storage().data(), bytes);
  return like(std::move(storage), DispatchKey::CUDA, tensor);
}

// -- CUDA graphs ------------------------------------------------------------------------------------------------------

void add_step(std::function<void()> step) {
  std::lock_guard<std::mutex> lock(graph_mutex);
  captured.load()->steps.push_back(std::move(step));
}

// A tensor of the host over memory of the device at its address, whatever lies there by then: as a graph has it.
Tensor at_address(const Tensor& tensor) {
  c10::DataPtr data(const_cast<void*>(tensor.storage().data()), Device(DeviceType::CPU));
  c10::Storage other(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), nullptr, false);
  return like(std::move(other), DispatchKey::CPU, tensor);
}

void check_address(const void* data) {
  TORCH_CHECK(
      !data || device_blocks.contains(data), "CUDA error: an illegal memory access was encountered (a graph's replay "
      "reads or writes memory that was freed since its capture)");
}

// Where a replay puts a result of the CPU kernel: the memory that the captured one got.
struct Place {
  size_t result;
  void* data;
  size_t bytes;
};

void put(const std::vector<Place>& places, const std::vector<Tensor>& results) {
  for (const Place& place : places) {
    check_address(place.data);
    std::memcpy(place.data, results[place.result].storage().data(), place.bytes);
  }
}

// -- reports ----------------------------------------------------------------------------------------------------------

std::atomic<bool> recording{false};
py::object& listener = *new py::object;  // called with ("wait" | "copy" | "launch", what, bytes)

void report(const char* kind, const std::string& what, size_t bytes = 0) {
  if (std::strcmp(kind, "launch") != 0) refuse_in_capture(what);
  if (!recording) return;
  py::gil_scoped_acquire gil;
  listener(kind, what, bytes);
}

size_t bytes_of(const Tensor& tensor) { return tensor.numel() * tensor.element_size(); }

// Operations whose result the host needs: a number, or a size that depends on values.
bool makes_the_host_wait(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::_local_scalar_dense", "aten::_unique2",      "aten::bincount",       "aten::equal",
      "aten::is_nonzero",          "aten::masked_select", "aten::nonzero",        "aten::nonzero_static",
      "aten::repeat_interleave",   "aten::unique_dim",    "aten::unique_consecutive"};
  return names.count(name) > 0;
}

// The indices of these, and no other tensors but numbers, may lie on the host. aten::index.Tensor turns masks into
// indices, and copies them, by operations that report themselves.
bool takes_indices(const std::string& name) { return name == "aten::index" || name == "aten::_index_put_impl_"; }

void report_copy(const Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() == from.is_cuda()) return;
  const Tensor& on_host = to.is_cuda() ? from : to;
  const bool pinned = pinned_blocks.contains(on_host.storage().data());
  const std::string direction = to.is_cuda() ? "host to device" : "device to host";
  if (!non_blocking) return report("wait", "copy " + direction);
  if (pinned) return report("copy", direction + ", pinned");
  // From pageable memory the driver copies to a buffer of its own and returns; to pageable memory it waits.
  if (to.is_cuda()) return report("copy", direction + ", pageable");
  report("wait", "copy " + direction + ", pageable");
}

// -- what PyTorch adds to a convolution by cuDNN ----------------------------------------------------------------------

struct Pass {
  const char* name;
  size_t bytes;
};

bool channels_last(const Tensor& tensor) { return tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

bool is_convolution(const std::string& name) { return name.rfind("aten::convolution", 0) == 0; }

// Whether a convolution works on, and gives, pixels whose channels lie together: its input's layout, or its weight's.
bool works_channels_last(const std::string& name, const IValue* arguments) {
  const int first = name == "aten::convolution" ? 0 : 1;  // the backward pass has its gradient in front
  const Tensor x = arguments[first].toTensor(), weight = arguments[first + 1].toTensor();
  return x.dim() == 4 && (channels_last(x) || channels_last(weight));
}

// cuDNN has no bias, and wants a weight in the layout of its pixels.
std::vector<Pass> passes_beside(const std::string& name, const IValue* arguments) {
  if (!is_convolution(name)) return {};
  std::vector<Pass> passes;
  const bool last = works_channels_last(name, arguments), backward = name == "aten::convolution_backward";
  const Tensor weight = arguments[backward ? 2 : 1].toTensor();
  const bool converts = last && !weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (converts) passes.push_back({"cudnn::weight to channels_last", 2 * bytes_of(weight)});
  if (backward) {
    const auto wanted = arguments[10].toBoolList();  // gradients of input, weight, bias
    if (converts && wanted[1]) passes.push_back({"cudnn::gradient to the weight's layout", 2 * bytes_of(weight)});
    if (wanted[2]) passes.push_back({"cudnn::sum bias gradient", bytes_of(arguments[0].toTensor())});
  } else if (arguments[2].isTensor() && arguments[2].toTensor().defined()) {
    passes.push_back({"cudnn::add bias", 0});
  }
  return passes;
}

// Values of products and of Triton's kernels can be left out: they are most of a network's time on the host.
bool values_are_computed = true;

bool is_product(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};
  return names.count(name) > 0;
}

// -- every operation --------------------------------------------------------------------------------------------------

template <class Visit>
void for_each_tensor(const IValue& value, Visit visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector())
      if (tensor.defined()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      if (tensor && tensor->defined()) visit(*tensor);
  }
}

template <class Change>
IValue with_tensors_changed(const IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    std::vector<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : tensor);
    return list;
  }
  return value;
}

// One call of an operation that has tensors of the device, or makes them.
class Call {
 public:
  Call(const c10::OperatorHandle& operation, torch::jit::Stack* stack)
      : operation_(operation), schema_(operation.schema()), name_(schema_.name()), stack_(stack) {
    first_ = stack->size() - schema_.arguments().size();
    for (size_t i = 0; i < schema_.arguments().size(); ++i)
      for_each_tensor(argument(i), [&](const Tensor& tensor) {
        if (!tensor.is_cuda()) return void(hosts_.insert(tensor.unsafeGetTensorImpl()));
        originals_.push_back(tensor);
        bytes_ += bytes_of(tensor) * accesses(i);
      });
    on_device_ = !originals_.empty();
    valueless_ = on_device_ && !values_are_computed && is_product(name_);
    if (on_device_) passes_ = passes_beside(name_, &(*stack)[first_]);
    if (valueless_ && is_convolution(name_) && works_channels_last(name_, &(*stack)[first_]))
      format_ = at::MemoryFormat::ChannelsLast;
  }

  // A GPU takes numbers of the host (tensors of no dimension) and, after a copy, indices; no other tensor of the host.
  void check_devices() const {
    if (!on_device_ || name_ == "aten::copy_") return;
    for (size_t i = 0; i < schema_.arguments().size(); ++i)
      for_each_tensor(argument(i), [&](const Tensor& tensor) {
        if (tensor.is_cuda() || tensor.dim() == 0) return;
        if (takes_indices(name_) && i == 1) return report_host_index();
        TORCH_CHECK(
            false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
            name_, ", argument ", schema_.arguments()[i].name(), ")");
      });
  }

  void report_waits() const {
    if (name_ == "aten::copy_") report_copy(argument(0).toTensor(), argument(1).toTensor(), argument(2).toBool());
    if (makes_the_host_wait(name_)) report("wait", name_);
    if (name_ == "aten::_index_put_impl_") report_masks();
  }

  void put_arguments_on_host() {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      IValue& value = (*stack_)[first_ + i];
      if (value.isDevice() && value.toDevice().is_cuda()) {
        value = IValue(Device(DeviceType::CPU));
        on_device_ = true;
      } else {
        const bool out = schema_.arguments()[i].is_out();
        value = with_tensors_changed(value, [&](const Tensor& tensor) { return stand_in(tensor, out); });
      }
    }
  }

  // While a graph is captured: the arguments of the CPU kernel as a replay will have them.
  void keep_arguments() {
    for (size_t i = 0; i < schema_.arguments().size(); ++i)
      kept_.push_back(with_tensors_changed(argument(i), [&](const Tensor& tensor) {
        const auto found = tensor.defined() ? aliases_.find(tensor.unsafeGetTensorImpl()) : aliases_.end();
        if (found == aliases_.end() || found->second.own) return tensor;
        addresses_.push_back(tensor.numel() ? tensor.const_data_ptr() : nullptr);
        return at_address(tensor);
      }));
  }

  void put_results_on_device() {
    bool launched = schema_.returns().empty();
    std::vector<Place> places;
    size_t count = 0;
    for (size_t i = stack_->size() - schema_.returns().size(); i < stack_->size(); ++i)
      (*stack_)[i] = with_tensors_changed((*stack_)[i], [&](const Tensor& tensor) {
        bool own = false;
        const Tensor result = of_device(tensor, launched, own);
        if (own) places.push_back({count, const_cast<void*>(result.storage().data()), result.storage().nbytes()});
        ++count;
        return result;
      });
    if (!launched) return;
    if (captured && on_device_ && !valueless_) add_step(step(std::move(places)));
    report("launch", name_, bytes_);
    for (const Pass& pass : passes_) report("launch", pass.name, pass.bytes ? pass.bytes : 2 * written_);
  }

 private:
  const IValue& argument(size_t i) const { return (*stack_)[first_ + i]; }

  // How often an argument's memory is read, and written if no result says so.
  size_t accesses(size_t i) const {
    const c10::Argument& about = schema_.arguments()[i];
    const bool reads = !about.is_out() && !(name_ == "aten::copy_" && i == 0);
    const bool writes = schema_.returns().empty() && about.alias_info() && about.alias_info()->isWrite();
    return reads + writes;
  }

  void report_masks() const {
    const bool fills = argument(2).toTensor().numel() == 1 && !argument(3).toBool();  // PyTorch makes it masked_fill_
    for_each_tensor(argument(1), [&](const Tensor& index) {
      const bool mask = index.dtype() == at::kBool || index.dtype() == at::kByte;
      if (mask && index.is_cuda() && !fills) report("wait", name_ + " by a mask");
    });
  }

  void report_host_index() const {
    if (name_ == "aten::_index_put_impl_") report("wait", name_ + " by indices on the host");
  }

  // What the CPU kernel gets instead of `tensor`.
  Tensor stand_in(const Tensor& tensor, bool out) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    if (valueless_) return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
    // An alias cannot grow: where a result will be given its size, the kernel has a tensor of its own.
    const bool own = out && tensor.numel() == 0;
    Tensor alias = own ? at::empty({0}, tensor.options().device(at::kCPU)) : host_alias(tensor);
    aliases_[alias.unsafeGetTensorImpl()] = {alias, tensor, own};
    return alias;
  }

  // The call as a graph replays it.
  std::function<void()> step(std::vector<Place> places) {
    return [operation = operation_, kept = std::move(kept_), addresses = std::move(addresses_),
            places = std::move(places)] {
      for (const void* address : addresses) check_address(address);
      torch::jit::Stack stack = kept;
      operation.callBoxed(&stack);
      std::vector<Tensor> results;
      for (const IValue& value : stack)
        with_tensors_changed(value, [&](const Tensor& tensor) { return results.emplace_back(tensor); });
      put(places, results);
    };
  }

  // The tensor of the device that a result of the CPU kernel stands for; `own` if it has memory of its own.
  Tensor of_device(const Tensor& result, bool& launched, bool& own) {
    if (!result.defined() || result.is_cuda() || !on_device_) return result;
    if (valueless_) return fresh(valueless(result), launched);
    if (hosts_.count(result.unsafeGetTensorImpl())) return result;
    const auto found = aliases_.find(result.unsafeGetTensorImpl());
    if (found != aliases_.end()) {
      own = found->second.own;
      return fresh(written(found->second), launched);
    }
    for (const Tensor& original : originals_)
      if (result.storage().nbytes() && result.storage().data() == original.storage().data())
        return view_of(original, result);
    own = true;
    return fresh(to_device(result), launched);
  }

  Tensor valueless(const Tensor& shape) const {
    const auto options = shape.options().device(at::kCUDA);
    if (format_ && shape.dim() == 4) return at::empty(shape.sizes(), options, format_);
    return at::empty_strided(shape.sizes(), shape.strides(), options);
  }

  Tensor fresh(const Tensor& result, bool& launched) {
    launched = true;
    written_ += bytes_of(result);
    bytes_ += bytes_of(result);
    return result;
  }

  struct Alias {
    Tensor host, original;  // both kept: the address of one that is freed would be that of another
    bool own;
  };

  // The original of an alias that the kernel has written, or whose shape it has changed.
  static Tensor written(const Alias& alias) {
    c10::TensorImpl* original = alias.original.unsafeGetTensorImpl();
    if (alias.own) original->set_storage_keep_dtype(to_device(alias.host).storage());
    original->set_storage_offset(alias.host.storage_offset());
    original->set_sizes_and_strides(alias.host.sizes(), alias.host.strides());
    return alias.original;
  }

  static Tensor view_of(const Tensor& original, const Tensor& shape) {
    Tensor out = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(original.storage()), original.key_set(), shape.dtype());
    out.unsafeGetTensorImpl()->set_storage_offset(shape.storage_offset());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides());
    return out;
  }

  const c10::OperatorHandle operation_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  torch::jit::Stack* stack_;
  size_t first_;
  bool on_device_, valueless_ = false;
  size_t bytes_ = 0, written_ = 0;
  std::vector<Pass> passes_;
  std::optional<at::MemoryFormat> format_;  // of a convolution's results without values
  std::vector<Tensor> originals_;
  std::unordered_set<c10::TensorImpl*> hosts_;
  std::unordered_map<c10::TensorImpl*, Alias> aliases_;
  torch::jit::Stack kept_;
  std::vector<const void*> addresses_;
};

void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  Call call(operation, stack);
  call.check_devices();
  call.report_waits();
  call.put_arguments_on_host();
  if (captured) call.keep_arguments();
  operation.callBoxed(stack);
  call.put_results_on_device();
}

// -- operations that handle memory ------------------------------------------------------------------------------------

Tensor empty_memory_format(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(
      size, &device_allocator, c10::DispatchKeySet(DispatchKey::CUDA), dtype.value_or(at::kFloat), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, c10::DispatchKeySet(DispatchKey::CUDA), dtype.value_or(at::kFloat));
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  c10::TensorImpl* tensor = self.unsafeGetTensorImpl();
  c10::Storage storage = self.storage();
  const size_t bytes = self.element_size() * (c10::multiply_integers(size) + self.storage_offset());
  if (storage.nbytes() < bytes) {
    c10::DataPtr grown = device_allocator.allocate(bytes);
    if (storage.nbytes()) std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(bytes);
  }
  tensor->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(
    Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  c10::TensorImpl* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) tensor->set_sizes_contiguous(size);
  else tensor->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage storage) {
  const int64_t elements = storage.nbytes() / self.element_size();
  return set_storage(self, std::move(storage), 0, {elements}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// -- attention, by the operation that PyTorch takes on a GPU ----------------------------------------------------------

int64_t choose_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return static_cast<int64_t>(at::SDPBackend::efficient_attention);
}

// Results lie in memory as (batch, position, head, channel).
Tensor position_major(const Tensor& tensor) {
  return tensor.transpose(1, 2).contiguous().transpose(1, 2);
}

// A GPU's kernel keeps a number of each position, of multiples of 32, if a backward pass will want them.
Tensor padded(const Tensor& sums, bool kept) {
  constexpr int64_t kMultiple = 32;
  const int64_t positions = kept ? (sums.size(2) + kMultiple - 1) / kMultiple * kMultiple : 0;
  Tensor out = at::full({sums.size(0), sums.size(1), positions}, INFINITY, sums.options());
  if (kept) out.narrow(2, 0, sums.size(2)).copy_(sums);
  return out;
}

using Tensors = std::vector<Tensor>;

// Results of a CPU kernel of tensors of the device, as fresh tensors of it; a graph that is captured gets it as a step.
Tensors computed(const Tensors& arguments, std::function<Tensors(const Tensors&)> compute) {
  Tensors aliases, results;
  for (const Tensor& argument : arguments) aliases.push_back(host_alias(argument));
  for (const Tensor& result : compute(aliases)) results.push_back(to_device(result));
  if (!captured) return results;
  Tensors kept;
  std::vector<Place> places;
  for (const Tensor& argument : arguments) kept.push_back(at_address(argument));
  for (size_t i = 0; i < results.size(); ++i)
    places.push_back({i, const_cast<void*>(results[i].storage().data()), results[i].storage().nbytes()});
  add_step([kept, places, compute] {
    for (const Tensor& argument : kept) check_address(argument.const_data_ptr());
    put(places, compute(kept));
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, bool keep_sums,
    double dropout, bool causal, std::optional<double> scale) {
  TORCH_CHECK(!bias && dropout == 0, "the stand-in has attention without bias and dropout alone");
  const Tensors results = computed({query, key, value}, [=](const Tensors& on_host) -> Tensors {
    const auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
        on_host[0], on_host[1], on_host[2], 0.0, causal, std::nullopt, scale);
    const Tensor no_seed = at::zeros({}, at::kLong);
    return {position_major(out), padded(sums, keep_sums), no_seed, no_seed};
  });
  report("launch", "aten::_scaled_dot_product_efficient_attention", 4 * bytes_of(query));
  return {results[0], results[1], results[2], results[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, double, std::array<bool, 4>, bool causal,
    std::optional<double> scale) {
  const Tensors results = computed({gradient, query, key, value, out, sums}, [=](const Tensors& on_host) -> Tensors {
    const auto [by_query, by_key, by_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        on_host[0], on_host[1], on_host[2], on_host[3], on_host[4], on_host[5].narrow(2, 0, on_host[1].size(2)), 0.0,
        causal, std::nullopt, scale);
    return {position_major(by_query), position_major(by_key), position_major(by_value)};
  });
  report("launch", "aten::_scaled_dot_product_efficient_attention_backward", 8 * bytes_of(query));
  return {results[0], results[1], results[2], Tensor()};
}

// -- registration -----------------------------------------------------------------------------------------------------

// One kernel on a GPU, made of several operations on other devices: caught before it is taken apart.
bool is_one_kernel(const c10::OperatorName& operation) {
  static const std::set<std::string> names = {
      "aten::copy_", "aten::convolution", "aten::convolution_backward", "aten::native_group_norm",
      "aten::native_group_norm_backward", "aten::native_dropout", "aten::silu", "aten::silu_backward"};
  const auto found = c10::Dispatcher::singleton().findOp(operation);
  if (!found || found->hasKernelForDispatchKey(DispatchKey::CUDA)) return false;
  return names.count(operation.name) > 0 || operation.name.rfind("aten::_foreach_", 0) == 0;
}

}  // namespace

namespace at {
using StandInGuard = ::StandInGuard;
C10_REGISTER_GUARD_IMPL(CUDA, StandInGuard)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty_memory_format);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("_scaled_dot_product_efficient_attention", &attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", &attention_backward);
  for (const c10::OperatorName& operation : c10::Dispatcher::singleton().getAllOpNames())
    if (is_one_kernel(operation))
      library.impl(c10::toString(operation).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

PYBIND11_MODULE(gpu_stand_in_device, module) {
  c10::SetAllocator(DeviceType::CUDA, &device_allocator, 200);
  take_over_hooks();
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  module.def("listen", [](py::object function) { listener = std::move(function); });
  module.def("record", [](bool on) { recording = on; });
  module.def("compute_values", [](bool on) { values_are_computed = on; });
  module.def("values_are_computed", [] { return values_are_computed; });
  module.def("host_alias", [](const Tensor& tensor) { return host_alias(tensor.detach()); });
  module.def("current_device", [] { return static_cast<int>(current_device); });
  module.def("exchange_device", [](int index) {
    return static_cast<int>(exchange_device(static_cast<c10::DeviceIndex>(index)));
  });
  module.def("set_device_count", [](int count) { device_count = count; });
  module.def("allocated", [] { return device_blocks.allocated(); });
  module.def("peak", [] { return device_blocks.peak(); });
  module.def("reset_peak", [] { device_blocks.reset_peak(); });
  module.def("begin_capture", [](size_t number, size_t pool) {
    TORCH_CHECK(!captured, "a graph is being captured");
    captured = &(graphs[number] = Graph{pool, {}});
  });
  module.def("end_capture", [] { captured = nullptr; });
  module.def("capturing", [] { return captured != nullptr; });
  module.def("add_step", [](py::object step) {
    add_step([step = new py::object(std::move(step))] {
      py::gil_scoped_acquire gil;
      (*step)();
    });
  }, "Have the graph that is being captured call a function of Python when it is replayed.");
  module.def("replay", [](size_t number) {
    py::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (const auto& step : graphs.at(number).steps) step();
  });
  module.def("forget", [](size_t number) { graphs.erase(number); }, "Its memory stays the pool's.");
  module.def("blocks", [] { return device_blocks.list(); }, "Addresses and sizes of what lives on the device.");
}
