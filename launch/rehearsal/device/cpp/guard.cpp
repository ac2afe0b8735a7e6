// A CUDA device guard for a torch that was built without CUDA: one device, streams that are numbers, events that are
// always complete. Autograd asks it for the device and stream of a node; nothing is ever queued.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

namespace {

constexpr auto kCuda = c10::DeviceType::CUDA;

thread_local c10::StreamId stream_of_thread = 0;
std::atomic<c10::StreamId> streams_made{0};

c10::Stream numbered(c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kCuda, 0), id);
}

struct FakeDeviceGuard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kCuda;

  c10::DeviceType type() const override { return kCuda; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return {kCuda, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return {kCuda, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  c10::Stream getStream(c10::Device) const override { return numbered(stream_of_thread); }
  c10::Stream getDefaultStream(c10::Device) const override { return numbered(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return numbered(++streams_made); }
  c10::Stream getNewStream(c10::Device, int) const override { return numbered(++streams_made); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::StreamId before = stream_of_thread;
    stream_of_thread = stream.id();
    return numbered(before);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = &stream_of_thread;  // any non-null address: null means that nothing was recorded
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeDeviceGuard)

}  // namespace
